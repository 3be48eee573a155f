"""What a chat template may do at most: both sides of each limit, and that honest templates render as before."""

import pytest

from helixd.model import chat
from helixd.model.chat import ChatError, ChatTemplate
from helixd.model.sandbox import MAX_BITS, MAX_LENGTH, MeteredSandbox, OverBudget, metered

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, object]] | None = None) -> str:
    return ChatTemplate(source, {}).render(messages or HI)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for n in [3, 1] %}{{ loop.index }}{{ n }}{{ loop.last }} {% endfor %}", "13False 21True "),
        ("{% for n in [] %}{{ n }}{% else %}none{% endfor %}", "none"),
        ("{% for n in nothing %}{{ n }}{% endfor %}.", "."),
        ("{% for n in [1, 2, 3] if n > 1 %}{{ n }}/{{ loop.length }} {% endfor %}", "2/2 3/2 "),
        ("{% for k in {'a': 1} %}{{ k }}{% endfor %}", "a"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for a in [1, 2] %}{{ loop.previtem }}{% for b in 'xy' %}{{ a }}{{ b }}{{ loop.nextitem }}{% endfor %}"
         "{% endfor %}", "1xy1y12xy2y"),
        ("{% for a in [[1], []] recursive %}[{% if a is sequence %}{{ loop(a) }}{% else %}{{ a }}{% endif %}]"
         "{% endfor %}", "[[1]][]"),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{{ '=' * 3 + 'x' ~ 2 ** 10 ~ 7 % 4 ~ '%03d' % 5 }}", "===x10243005"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}{{ ' x '.strip().center(5) }}", "abab  x  "),
    ],
)  # fmt: skip
def test_templates_render_as_before(source: str, text: str) -> None:
    assert render(source) == text


def test_a_template_may_do_so_many_steps() -> None:
    environment = MeteredSandbox()
    for source in ("{% for n in range(9) %}{% endfor %}", "{% macro m() %}{% endmacro %}" + "{% set x = m() %}" * 10):
        template = environment.from_string(source)
        with metered(10, 60.0):
            template.render()
        with metered(9, 60.0), pytest.raises(OverBudget, match="more than 9 steps"):
            template.render()


def test_a_template_may_take_so_long() -> None:
    template = MeteredSandbox().from_string("{% for n in range(9) %}{% endfor %}")
    for seconds, fits in ((11.0, True), (10.0, False)):
        now = iter(range(100))
        with metered(1000, seconds, lambda now=now: float(next(now))):
            if fits:
                template.render()
            else:
                with pytest.raises(OverBudget, match="more than 10 s"):
                    template.render()


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(64) }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% set n = 10 ** 9 %}{{ n ** n }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{% set n = 10 ** 9 %}{{ 'a'.center(n) }}{{ 'a'.ljust(width=n) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{% set ns = namespace(s='ab') %}{% for n in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(n=3) %}{% for n in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_what_would_not_end_or_not_fit_is_the_requests_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_STEPS", 20_000)
    with pytest.raises(ChatError, match=r"(cannot render|refuses) these messages"):
        render(source)


@pytest.mark.parametrize("value", ["'a' * {}", "[0] * {}", "{} * 'a'"])
def test_values_may_be_so_large(value: str) -> None:
    environment = MeteredSandbox()
    with metered(1000, 60.0):
        for length, fits in ((MAX_LENGTH, True), (MAX_LENGTH + 1, False)):
            template = environment.from_string(
                "{% set n = given %}{% set x = " + value.format("n") + " %}{{ x|length }}"
            )
            if fits:
                assert template.render(given=length) == str(length)
            else:
                with pytest.raises(OverBudget, match="too large"):
                    template.render(given=length)


def test_numbers_may_have_so_many_bits() -> None:
    template = MeteredSandbox().from_string("{% set x = base ** power %}")
    with metered(1000, 60.0):
        template.render(base=3, power=MAX_BITS // 2)
        with pytest.raises(OverBudget):
            template.render(base=3, power=MAX_BITS // 2 + 1)
        template.render(base=2.0, power=3)
        template.render(base=2, power=-3)
