import json
from datetime import datetime

import pytest

import helixd.model.chat as chat
from helixd.errors import ModelError
from helixd.model.chat import ChatError, ChatTemplate

CHATML = """
{%- if messages[0].role != 'system' %}{{ raise_exception('start with a system message') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MESSAGES = [
    {"role": "system", "content": "be <b>brief</b> & 'exact'"},
    {"role": "tool", "content": "skipped"},
    {"role": "user", "content": "héllo 🙂\n {{ 7*7 }} {% raw %}"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def template(source, **options):
    return ChatTemplate(source, TOKENS, **options)


def test_renders_messages_as_data():
    assert template(CHATML).render(MESSAGES) == (
        "<|im_start|>system\nbe <b>brief</b> & 'exact'<|im_end|>\n"
        "<|im_start|>user\nhéllo 🙂\n {{ 7*7 }} {% raw %}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not template(CHATML).render(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


SAME_AS_TRANSFORMERS = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.last %}\n last {{ m | tojson }}\n {% endif %}\n{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    "{% if tools is not none %}tools{% endif %}{{ tools }}{{ documents }}{{ undefined_name }}|{{ messages | length }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ messages[-1].content.split('\\n')[0].strip() }}{{ messages[0]['content'][:4] }}",
]


@pytest.mark.parametrize("source", SAME_AS_TRANSFORMERS)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_what_transformers_renders(source, generation_prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=generation_prompt, **TOKENS
    )
    assert template(source).render(MESSAGES, generation_prompt) == expected


def test_the_date_is_given():
    fixed = template("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert fixed.render(MESSAGES) == "26 Jul 2024"
    assert template("{{ strftime_now('%Y') }}").render(MESSAGES).isdigit()


def test_what_the_template_refuses_is_a_client_error():
    with pytest.raises(ChatError, match="refuses these messages: start with a system message"):
        template(CHATML).render(MESSAGES[1:])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ messages[0].nope.nope }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.encode('utf-8').decode('ascii', 'nope') }}{{ '%d' % 'x' }}",
        "{{ messages | tojson(indent='x', nope=1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_fails_while_rendering_is_a_client_error(source):
    with pytest.raises(ChatError):
        template(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['json'] }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = [{"role": "system", "content": "x"}]
    with pytest.raises(ChatError):
        template(source).render(messages)
    assert messages == [{"role": "system", "content": "x"}]


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(chat, "MAX_OUTPUT_CHARS", 10)
    assert template("{{ messages[0].content }}").render([{"content": "x" * 10}]) == "x" * 10
    with pytest.raises(ChatError, match="more than 10"):
        template("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}").render([{"content": "x" * 4}])


def test_arguments_are_scalars_from_a_list():
    thinking = template("{{ 'on' if enable_thinking else 'off' }}")
    assert thinking.render(MESSAGES, enable_thinking=True) == "on"
    assert thinking.render(MESSAGES) == "off"
    for arguments in ({"eos_token": "x"}, {"tools": None}, {"anything": 1}):
        with pytest.raises(ChatError, match="not allowed"):
            thinking.render(MESSAGES, **arguments)
    with pytest.raises(ChatError, match="must be a string"):
        thinking.render(MESSAGES, enable_thinking=[1])


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nope %}", "{% generation %}"])
def test_a_template_that_does_not_compile_is_the_checkpoints_fault(source):
    with pytest.raises(ModelError, match="cannot be compiled"):
        template(source)


def test_where_templates_come_from(tmp_path):
    def load():
        loaded = ChatTemplate.load(tmp_path, TOKENS)
        return None if loaded is None else loaded.render(MESSAGES)

    settings = tmp_path / "tokenizer_config.json"
    assert load() is None
    settings.write_text("{}")
    assert load() is None
    settings.write_text(json.dumps({"chat_template": "string {{ bos_token }}"}))
    assert load() == "string <s>"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert load() == "default"
    settings.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(ModelError, match="none of them 'default'"):
        load()
    settings.write_text(json.dumps({"chat_template": [{"name": ["default"], "template": "{{ 1 }}"}, 7]}))
    with pytest.raises(ModelError, match="none of them 'default'"):
        load()
    settings.write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(ModelError, match="must be a string"):
        load()
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert load() == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="not UTF-8"):
        load()
