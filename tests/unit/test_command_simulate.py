import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helixd.cli import main
from helixd.commands.simulate import build_parser

CLUSTER = {
    "format": "helixd-cluster/1",
    "name": "tiny",
    "model": {"num_layers": 4, "layer_bytes": 1e6, "activation_bytes": 1000, "token_bytes": 4},
    "workload": {"mean_input_tokens": 50, "mean_output_tokens": 20},
    "node_types": {
        "t": {
            "memory_bytes": 1e9,
            "max_layers": 4,
            "throughput_tokens_per_s": [1000, 500, 333, 250],
            "kv_capacity_token_layers": [20000, 20000, 20000, 20000],
            "prompt_layer_time_s": [[0, 0], [1000, 0.1]],
            "decode_layer_time_s": [[0, 0], [2, 0.002], [100, 0.004]],
            "batch_limits": [],
        }
    },
    "nodes": [{"id": node, "type": "t"} for node in "abc"],
    "links": [
        [src, dst, 1e8, 0.001] for src in ("coordinator", *"abc") for dst in ("coordinator", *"abc") if src != dst
    ],
}
PLACEMENT = {"placement": {"a": [0, 2], "b": [2, 4], "c": [2, 4]}}
QUICK = ["--warm-up", "1", "--measure", "5"]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(CLUSTER))
    (tmp_path / "plan.json").write_text(json.dumps(PLACEMENT))
    return path


def plan_of(cluster: Path) -> str:
    return str(cluster.parent / "plan.json")


def run(*arguments: object) -> int:
    return main(["simulate", *map(str, arguments)])


def test_json_has_what_tools_read(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, plan_of(cluster), *QUICK, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decode_tokens_per_s"] > 0
    assert found["total_tokens_per_s"] > found["decode_tokens_per_s"]
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        assert 0 < found[key]["p50"] <= found[key]["p95"]
        assert found[key]["mean"] > 0
    assert found["max_flow_tokens_per_s"] == pytest.approx(500)
    assert found["nodes"]["b"]["layers"] == [2, 4]
    assert found["compared"] is None


def test_other_plans_are_set_beside_it_and_drawn(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = cluster.parent / "out.svg"
    status = run(cluster, plan_of(cluster), *QUICK, "--rate", "300", "--compare", "petals", "swarm", "--svg", svg)
    assert status == 0
    out = capsys.readouterr().out
    for word in ("tiny", "300.0 tokens/s arrive", "petals", "swarm", "first token", "KV peak", "ms compute"):
        assert word in out
    drawn = ElementTree.parse(svg).getroot()
    assert drawn.tag.endswith("svg")
    assert "petals" in "".join(drawn.itertext())


def test_what_has_no_plan_is_told_beside_the_others(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {**CLUSTER, "nodes": [{"id": f"n{i}", "type": "t"} for i in range(13)]}
    ends = ["coordinator", *(node["id"] for node in many["nodes"])]
    many["links"] = [[src, dst, 1e8, 0.001] for src in ends for dst in ends if src != dst]
    cluster.write_text(json.dumps(many))
    assert run(cluster, "petals", *QUICK, "--compare", "milp", "swarm", "--json") == 0
    found = json.loads(capsys.readouterr().out)["compared"]
    assert "13 nodes are too many" in found["milp"]["no_plan"]
    assert found["swarm"]["decode_tokens_per_s"] > 0
    assert run(cluster, "petals", *QUICK, "--compare", "milp") == 0
    assert "milp: no plan: 13 nodes" in capsys.readouterr().out
    assert run(cluster, "milp", *QUICK) == 69


def test_a_plan_can_be_made_on_the_way(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, "auto", *QUICK, "--json") == 0
    assert json.loads(capsys.readouterr().out)["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("policy", ["paper", "paper/swarm", "helixd/random"])
def test_policies_by_name(policy: str, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cluster, plan_of(cluster), *QUICK, "--in-flight", "3", "--policy", policy, "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy"].startswith(policy)


def test_traces_give_lengths_or_the_requests_themselves(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths, timed, counts = (cluster.parent / name for name in ("l.csv", "t.csv", "c.csv"))
    lengths.write_text("input_tokens,output_tokens\n30,5\n")
    timed.write_text("arrival_s,input_tokens,output_tokens\n0.5,30,5\n0.9,40,6\n")
    counts.write_text("requests\n0\n9\n")
    assert (
        run(cluster, plan_of(cluster), *QUICK, "--rate", "70", "--trace", lengths, "--arrivals", counts, "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["load"] == "online"
    assert run(cluster, plan_of(cluster), "--trace", timed, "--measure", "30", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["load"], found["started"], found["finished"]) == ("trace", 2, 2)
    assert run(cluster, plan_of(cluster), *QUICK, "--trace", timed, "--offline", "--json") == 0
    assert json.loads(capsys.readouterr().out)["load"] == "offline"


def test_a_node_may_fail_and_join(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ["--fail", "b@1", "--join", "b@4"]
    assert run(cluster, plan_of(cluster), "--rate", "300", "--measure", "20", *script, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recovered"] > 0
    assert found["dropped"] == 0


@pytest.mark.parametrize(
    ("text", "complaint", "line"),
    [
        ("a,b\n1,2\n", "no column input_tokens", 1),
        ("input_tokens,output_tokens\n1,2\nx,2\n", "'x' is not a whole number", 3),
        ("input_tokens,output_tokens\n0,2\n", "0 is below 1", 2),
        ("input_tokens,output_tokens\n1\n", "has 1 columns", 2),
        ("input_tokens,output_tokens,arrival_s\n1,2,5\n1,2,4\n", "before the line above", 3),
        ("input_tokens,output_tokens,arrival_s\n1,2,nan\n", "not a time", 2),
    ],
)
def test_bad_traces_are_told_by_line(
    text: str, complaint: str, line: int, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = cluster.parent / "bad.csv"
    trace.write_text(text)
    assert run(cluster, plan_of(cluster), "--trace", trace) == 65
    said = capsys.readouterr().err
    assert complaint in said
    assert f"bad.csv:{line}:" in said


def test_mistakes_end_with_a_line_and_a_status(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(cluster)
    for arguments, status, said in (
        ((cluster, cluster.parent / "none.json"), 66, "cannot be read"),
        ((cluster, plan, "--trace", cluster.parent / "none.csv"), 66, "cannot be read"),
        ((cluster, plan, "--fail", "zz@3"), 65, "no node zz"),
        ((cluster, plan, *QUICK, "--svg", cluster.parent / "no" / "x.svg"), 73, "cannot be written"),
        ((cluster, plan, "--policy", "paper", "--rate", "90000", *QUICK), 65, "no pipeline with room"),
    ):
        assert run(*arguments) == status, arguments
        assert said in capsys.readouterr().err
    for arguments in (
        (cluster, plan, "--rate", "0"),
        (cluster, plan, "--rate", "3", "--offline"),
        (cluster, plan, "--rate", "3", "--in-flight", "3"),
        (cluster, plan, "--arrivals", "x"),
        (cluster, plan, "--policy", "paper", "--chunk", "64"),
        (cluster, plan, "--fail", "b"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
        capsys.readouterr()
    (cluster.parent / "half.json").write_text(json.dumps({"placement": {"a": [0, 2]}}))
    assert run(cluster, cluster.parent / "half.json") == 69


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("--measure", ["1", "1e6"], ["0", "0.999", "1e-300", "1000001", "nan", "inf"]),
        ("--warm-up", ["0", "1e6"], ["-0.1", "1000001", "nan"]),
        ("--rate", ["1e-3", "1e6"], ["0", "-1", "1000001", "1e308", "nan"]),
        ("--in-flight", ["1", "100000"], ["0", "100001", "1000000000"]),
    ],
)
def test_both_sides_of_what_may_be_asked_for(
    option: str, good: list[str], bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in good:
        build_parser().parse_args(["cluster.json", "auto", option, text])
    for text in bad:
        with pytest.raises(SystemExit) as refused:
            build_parser().parse_args(["cluster.json", "auto", f"{option}={text}"])
        assert refused.value.code == 2
        assert f"argument {option}" in capsys.readouterr().err


def test_help_names_everything_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    for word in ("--trace", "--compare", "petals", "helixd/swarm", "exit status", "NODE@S"):
        assert word in out


@pytest.mark.parametrize("policy", ["helixd", "paper"])
def test_a_cluster_without_room_for_any_request_says_so_or_serves_nothing(
    policy: str, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    types = {"t": {**CLUSTER["node_types"]["t"], "kv_capacity_token_layers": [0] * 4}}  # type: ignore[index]
    cluster.write_text(json.dumps({**CLUSTER, "node_types": types}))
    status = run(cluster, plan_of(cluster), *QUICK, "--policy", policy)
    said = capsys.readouterr()
    if policy == "helixd":
        assert status == 65
        assert "no request fits" in said.err
        assert said.err.count("\n") == 1
    else:
        assert status == 0
        assert "served        0.00" in said.out
