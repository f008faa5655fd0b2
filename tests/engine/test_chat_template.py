"""Rendering chats as transformers does, and errors that carry the template's own words."""

from __future__ import annotations

import pickle
from dataclasses import replace
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.engine.chat_template import ChatOptions, ChatRenderer, ChatTemplate
from octavo.errors import ChatTemplateError

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": " Hi 'there'\n"},
    {"role": "assistant", "content": "Hello  "},
]
TEMPLATES = [
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m.content | trim }}\n    "
    "{% else %}\n{{ m['role'] }}:{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}A:{% endif %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{{ m | tojson(indent=2) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}{{ ns.n }}",
    "{{ tools | tojson if tools else 'none' }}{{ documents is none }}{{ flag | default('no') }}",
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "\xe9<"}}]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize(
    "options",
    [
        ChatOptions(),
        ChatOptions(add_generation_prompt=False, tools=TOOLS, template_kwargs={"flag": "yes"}),
    ],
)
def test_the_text_is_that_of_transformers(source, options):
    if "tools" not in source:  # transformers would leave them out without a word
        options = replace(options, tools=None)
    wanted, _ = render_jinja_template(
        [MESSAGES],
        tools=None if options.tools is None else list(options.tools),
        chat_template=source,
        add_generation_prompt=options.add_generation_prompt,
        **options.template_kwargs,
    )
    assert ChatTemplate(source).render(MESSAGES, options) == wanted[0]


@pytest.mark.parametrize(
    "source", [TEMPLATES[0], TEMPLATES[0].replace("m.content }}", "m.content | trim }}")]
)
def test_a_continued_message_ends_the_text_as_transformers_has_it(source):
    wanted, _ = render_jinja_template([MESSAGES], chat_template=source, continue_final_message=True)
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source).render(MESSAGES, options) == wanted[0]


def test_parts_of_a_message_can_be_continued():
    source = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}!"
    message = {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]}
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source).render([message], options) == "ab"


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        ("{{ raise_exception('no system role') }}", MESSAGES, {}, "no system role"),
        ("{{ messages[9].content.x }}", MESSAGES, {}, "refused"),
        ("{{ 1 + 'a' }}", MESSAGES, {}, "TypeError"),
        ("{{ messages.append(1) }}", MESSAGES, {}, "refused"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, {}, "refused"),
        ("x", [], {}, "messages is empty"),
        ("x", MESSAGES, {"continue_final_message": True}, "both true"),
        (
            "x",
            MESSAGES,
            {"continue_final_message": True, "add_generation_prompt": False},
            "leaves out the last message",
        ),
        (
            "x",
            [{"role": "user", "content": None}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "text content",
        ),
    ],
)
def test_what_a_template_refuses_is_an_error_of_the_request(source, messages, options, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(messages, ChatOptions(**options))


def test_a_malformed_template_is_refused_with_its_line():
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("ok\n{% for %}")


def test_special_tokens_and_the_clock_are_arguments():
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}",
        {"bos_token": "<s>"},
        now=lambda: datetime(2026, 11, 22),
    )
    assert template.render(MESSAGES) == "<s>22 Nov 2026"


def test_what_users_wrote_of_special_tokens_is_hidden_while_a_template_renders():
    source = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    renderer = ChatRenderer(source, {}, ("<|end|>", "<s>"))
    for text, is_hidden in [("a < b", False), ("a <|end|> b", True), ("tail <|en", True)]:
        rendered = renderer.render([{"role": "user", "content": text}])
        assert bool(rendered.literals) is is_hidden
        assert ("<|en" in rendered.text) is False
        assert rendered.shown == "<s>" + text
    rendered = renderer.render([{"role": "user", "content": [1, None, ("<s>",)]}])
    assert rendered.text.count("<s>") == 1
    assert rendered.literals == ("<s>",)


def test_a_renderer_and_what_it_made_can_be_sent_to_another_process():
    renderer = ChatRenderer("{{ bos }}{{ messages[0].content }}", {"bos": "<s>"}, ("<s>",))
    copy = pickle.loads(pickle.dumps(renderer))
    rendered = copy.render([{"role": "user", "content": "a <s>"}])
    assert pickle.loads(pickle.dumps(rendered)).shown == "<s>a <s>"


def test_documents_that_the_template_would_drop_are_refused():
    options = ChatOptions(documents=[{"text": "x"}])
    reads = ChatTemplate("{% macro d() %}{{ documents[0].text }}{% endmacro %}{{ d() }}")
    assert reads.render(MESSAGES, options) == "x"
    with pytest.raises(ChatTemplateError) as refused:
        ChatTemplate("{{ messages[0].content }}").render(MESSAGES, options)
    assert refused.value.param == "documents"


def nested(depth: int, leaf: object = "x") -> object:
    value = leaf
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize("depth", [101, 5_000, 100_000])
@pytest.mark.parametrize("field", ["messages", "tools", "documents", "chat_template_kwargs"])
def test_what_is_nested_too_deeply_is_refused_by_its_field(field: str, depth: int):
    renderer = ChatRenderer("{{ messages | tojson }}{{ tools }}{{ documents }}", {}, ["<s>"])
    deep = nested(depth)
    messages = [{"role": "user", "content": deep if field == "messages" else "x"}]
    options = ChatOptions(
        tools=[{"t": deep}] if field == "tools" else None,
        documents=[{"d": deep}] if field == "documents" else None,
        template_kwargs={"k": deep} if field == "chat_template_kwargs" else {},
    )
    with pytest.raises(
        ChatTemplateError, match=f"{field} is nested more than 100 levels"
    ) as caught:
        renderer.render(messages, options)
    assert caught.value.param == field
    while isinstance(deep, (dict, list)):  # freed level by level, not by recursion
        deep = deep.pop() if isinstance(deep, list) else deep.popitem()[1]


def test_what_refers_to_itself_is_refused_as_nested():
    message: dict[str, object] = {"role": "user"}
    message["content"] = [message]
    with pytest.raises(ChatTemplateError, match="nested"):
        ChatRenderer("{{ messages }}", {}, []).render([message])


def test_what_is_nested_less_is_rendered():
    renderer = ChatRenderer("{{ messages[0].content | tojson }}", {}, ["<s>"])
    assert renderer.render([{"role": "user", "content": nested(90)}]).text.count("x") == 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * n }}",
        "{{ n * 'a' }}",
        "{{ [1] * n }}",
        "{{ 2 ** n }}",
        "{{ n ** n }}",
        "{{ 'a'.ljust(n) }}",
        "{{ 'a'.center(width=n) }}",
        "{{ 'a'.zfill(n) }}",
        "{{ '%99999999999d' % n }}",
        "{{ '%*d' % (n, 1) }}",
        "{% for i in range(n) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% set b = 'a' * 9999999 %}{{ b.replace('a', b) }}",
        "{% set b = 'a' * 9999999 %}{{ b }}",
        "{% for i in range(99999) %}{{ messages[0].content }}aaaaaaaaaaaaaaaa{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ [][5] + 1 }}",
        "{{ messages[0].content.index('zzz') }}",
        "{{ messages.pop() }}",
    ],
)
def test_a_template_that_takes_too_much_or_fails_is_the_requests_error(source: str):
    options = ChatOptions(template_kwargs={"n": 10**12})
    with pytest.raises(ChatTemplateError) as caught:
        ChatRenderer(source, {}, []).render([{"role": "user", "content": "hi"}], options)
    assert caught.value.param == "messages"


def test_long_messages_may_be_repeated_by_a_template():
    source = "{% for i in range(3) %}{{ messages[0].content }}{{ '-' * 40 }}{% endfor %}"
    text = ChatRenderer(source, {}, []).render([{"role": "user", "content": "x" * 10**6}]).text
    assert text.count("x") == 3 * 10**6


LATE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Go on"},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Now"},
]
EACH = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
DROPS = (
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}[{{ m.role }}:{{ m.content }}]"
    "{% endif %}{% endfor %}"
)
RAISES = (
    "{% for m in messages %}{% if not loop.first and m.role == 'system' %}"
    "{{ raise_exception('late') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
)
ENDS = "{% if messages[-1].role == 'system' %}{{ raise_exception('last') }}{% endif %}" + EACH
HOISTS = (
    "{% for m in messages if m.role == 'system' %}[system:{{ m.content }}]{% endfor %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
)


def test_a_system_within_a_conversation_stands_where_it_stood():
    before = "[system:Be brief.][user:Hi][assistant:Hello]"
    assert ChatTemplate(EACH).render(LATE) == f"{before}[user:Go on][system:Be kind.][user:Now]"
    words = "Go on\n<system>\nBe kind.\n</system>\nNow"
    for source in (DROPS, RAISES, ENDS, HOISTS):
        assert ChatTemplate(source).render(LATE) == f"{before}[user:{words}]", source
