"""Real chat templates of all families: the round trip, and what a call is in each format.

vLLM's parsers are imported once, by the first template that needs one.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.chat.round_trip import conversation, sample_arguments
from elpo_ray.chat.template import Chat
from elpo_ray.chat.training_templates import change_of, training_template
from elpo_ray.types import Message, Parsed, ToolCall
from tests import models_page, templates

pytestmark = pytest.mark.real

QUESTION: Message = {"role": "user", "content": "question"}
NAMES = templates.names()
SUPPORTED = [name for name in NAMES if models_page.family_of(name) is not None]
REFUSED = {
    **dict.fromkeys(("lfm2", "lfm2_training"), "loses tool calls"),
    **dict.fromkeys(
        ("diffusion_gemma", "diffusion_gemma_training"),
        "rewrites earlier turns when a tool responds",
    ),
}
"""Why templates are refused; all others because they lose the tool schemas."""
THINKS = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "glm4moe"]
THINKS += ["nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "gemma4", "gemma4_v5"]


def chat_of(name: str) -> Chat:
    chat = models_page.outcome(name)
    assert isinstance(chat, Chat), chat
    return chat


def pieces(ids: list[int], mask: list[bool]) -> list[tuple[list[int], bool]]:
    pairs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [([id for id, _ in group], agent) for agent, group in pairs]


def test_there_are_as_many_as_promised() -> None:
    assert len(NAMES) == 72
    assert len(SUPPORTED) >= 36


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SUPPORTED])
def test_a_template_that_cannot_be_used_is_refused_with_the_true_reason(name: str) -> None:
    fault = models_page.outcome(name)
    assert isinstance(fault, str), f"{name} is accepted"
    assert REFUSED.get(name, "loses the tool schemas") in fault
    assert "Hermes" not in fault
    assert "\n" not in fault


@pytest.mark.parametrize("text", ["", "Let me see."])
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_round_trip_of_every_family(name: str, text: str) -> None:
    chat = chat_of(name)
    for tool in models_page.TOOLS:
        function: dict[str, Any] = tool["function"]
        arguments = sample_arguments(function)
        messages = conversation(function["name"], arguments, text)
        ids, mask = chat.conversation_ids(messages)
        parts = pieces(ids, mask)
        assert [agent for _, agent in parts] == [False, True, False, True, False, True]
        turns = [turn for turn, agent in parts if agent]
        for turn in turns:
            parsed, last = chat.parse(turn), turn is turns[-1]
            assert parsed.error is None
            assert parsed.call == (None if last else ToolCall(function["name"], arguments))
            assert parsed.text == chat.parse(turn[:-1]).text, "a turn without its end"
            assert turn[-1] in chat.end_of_turn_ids
        rollout = chat.prompt_ids(messages[:1]) + turns[0]
        for response, turn in zip(messages[2::2], turns[1:], strict=True):
            rollout += [*chat.observation_ids(response["content"], function["name"]), *turn]
        assert rollout == ids


@pytest.mark.parametrize("name", SUPPORTED)
def test_prompts_are_those_of_the_model_s_own_template(name: str) -> None:
    chat, template = chat_of(name), templates.text(name)
    change = change_of(template)
    if change is not None and change.file is not None:
        return  # a template of our own: the model's has no place for tools
    prompt = chat.tokenizer.apply_chat_template(
        [QUESTION],
        tools=models_page.TOOLS,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat.tokenizer.decode(chat.prompt_ids([QUESTION])) == prompt


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_whole_conversation_is_what_the_training_template_renders(name: str) -> None:
    chat = chat_of(name)
    messages = conversation("search_shop", {"query": "tea"})
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            messages[number] = message = {**message, "tool_calls": [dict(message["tool_calls"][0])]}
            message["tool_calls"][0]["id"] = f"call0000{number}"
        if message["role"] == "tool":
            call = {"tool_call_id": f"call0000{number - 1}", "name": "search_shop"}
            messages[number] = {**message, **call, "content": "plain"}
    whole = chat.tokenizer.apply_chat_template(
        messages,
        tools=models_page.TOOLS,
        chat_template=training_template(templates.text(name)),
        tokenize=False,
    )
    ids, _ = chat.conversation_ids(messages)
    ours = chat.tokenizer.decode(ids)
    end = chat.tokenizer.convert_ids_to_tokens(ids[-1])
    assert str(whole).rstrip() in (ours, ours.removesuffix(str(end)))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", THINKS)
def test_thinking_can_be_switched(name: str, thinking: bool) -> None:
    made = templates.tokenizer(templates.text(name))
    chat = Chat(made, models_page.TOOLS, options={"enable_thinking": thinking})
    conversations = [conversation("search_shop", {"query": "tea"})]
    if thinking:
        conversations.append(
            [
                {**message, "reasoning_content": "hmm"}
                if message["role"] == "assistant"
                else message
                for message in conversations[0]
            ]
        )
    for messages in conversations:
        ids, mask = chat.conversation_ids(messages)
        calls = [chat.parse(part).call for part, agent in pieces(ids, mask) if agent]
        assert [call is None for call in calls] == [False, False, True]
    assert thinking == ("hmm" in chat.tokenizer.decode(ids))


# --- what a call is ---

FORMATS = ["qwen2_5", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_ultra", "glm4moe", "llama3_2"]
FORMATS += ["gemma4_v5", "gemma4_v2", "lfm2_2_5", "deepseekv3"]
TAGS = {
    "llama3_2": ('{"name": "', "}"),
    "gemma4_v5": ("<|tool_call>", "<tool_call|>"),
    "gemma4_v2": ("<|tool_call>", "<tool_call|>"),
    "lfm2_2_5": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "deepseekv3": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
}
HERMES = ("<tool_call>", "</tool_call>")
THOUGHT = {name: ("<|channel>", "<channel|>") for name in ("gemma4_v5", "gemma4_v2")}


class Speaker:
    """Writes turns in one format and reads them."""

    def __init__(self, name: str) -> None:
        self.chat = chat_of(name)
        self.open, self.close = TAGS.get(name, HERMES)
        self.begin, self.end = THOUGHT.get(name, ("<think>", "</think>"))
        prompt = str(self.chat.tokenizer.decode(self.chat.prompt_ids([QUESTION])))
        self.opened = prompt.rstrip().endswith(self.begin)

    def call(self, query: str) -> str:
        """A turn that does nothing but call, without its thought."""
        messages = conversation("search_shop", {"query": query})[:2]
        ids, mask = self.chat.conversation_ids(messages)
        turn = pieces(ids, mask)[-1][0][:-1]
        text = str(self.chat.tokenizer.decode(turn))
        return text.partition(self.end)[2].lstrip() if self.end in text else text

    def thought(self, text: str) -> str:
        return ("" if self.opened else self.begin) + text + self.end + "\n"

    def read(self, text: str) -> Parsed:
        """The turn that says `text`, after an empty thought where the prompt has opened one."""
        ids = self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.chat.parse(ids)

    def said(self, text: str) -> Parsed:
        return self.read((self.end + "\n\n" if self.opened else "") + text)


@pytest.fixture(params=FORMATS)
def speaker(request: pytest.FixtureRequest) -> Speaker:
    return Speaker(request.param)


def query(parsed: Parsed) -> object:
    assert parsed.call is not None, parsed
    assert parsed.error is None
    return parsed.call.arguments["query"]


def is_answer(parsed: Parsed) -> bool:
    return parsed.call is None and parsed.error is None


def test_a_tag_in_prose_is_no_call(speaker: Speaker) -> None:
    tag, close = speaker.open, speaker.close
    for text in (
        f"The answer is 7; no {tag} was needed.",
        f"{tag} is what opens a call.",
        f"One writes {tag} and {close}.",
        f"One writes `{speaker.call('tea')}` to search.",
        f"I know the tags: {tag}…{close}",
    ):
        assert is_answer(speaker.said(text)), text


def test_thinking_is_no_place_for_calls(speaker: Speaker) -> None:
    draft, real = speaker.call("draft"), speaker.call("real\nline")
    assert is_answer(speaker.read(speaker.thought(f"maybe\n{draft}\n") + "The answer is 7."))
    assert query(speaker.read(speaker.thought(f"or {draft}?") + real)) == "real\nline"
    assert is_answer(speaker.read(("" if speaker.opened else speaker.begin) + f"maybe\n{draft}"))
    assert query(speaker.said(speaker.call(f"{speaker.begin} x"))) == f"{speaker.begin} x"


def test_text_before_a_call_may_mention_the_tag(speaker: Speaker) -> None:
    real = speaker.call("real")
    assert query(speaker.said(f"I use a {speaker.open} now.\n{real}")) == "real"
    assert query(speaker.said(f"Let me see.\n\n{real}")) == "real"


def test_a_call_without_what_belongs_to_it_is_malformed(speaker: Speaker) -> None:
    real = speaker.call("real")
    for text in (real[: -len(speaker.close)], real[: len(real) // 2]):
        parsed = speaker.said(text)
        assert parsed.call is None
        assert parsed.error, text
    if not speaker.open.startswith("{"):
        assert speaker.said(f"{speaker.open}\nnonsense\n{speaker.close}").error


def test_several_calls_and_unknown_tools_are_errors(speaker: Speaker) -> None:
    real = speaker.call("real")
    assert speaker.said(f"{real}\n{real}").error == "2 calls in one turn; send one"
    assert speaker.said(real.replace("search_shop", "shell")).error


def test_an_argument_may_contain_the_tags(speaker: Speaker) -> None:
    for text in (f"print('{speaker.close}')", f"a {speaker.close} b {speaker.close}", speaker.open):
        assert query(speaker.said(speaker.call(text))) == text


def test_json_in_an_answer_is_no_call_of_llama() -> None:
    speaker = Speaker("llama3_2")
    for text in ('{"name": "Bob", "age": 3}', '{"answer": 7}', 'It is {"name": "x"}.'):
        assert is_answer(speaker.said(text)), text
    assert speaker.said('{"name": "search_shop", "parameters": {"query": tea}}').error
    assert query(speaker.said("<|python_tag|>" + speaker.call("tea"))) == "tea"


MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' if loop.first }}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {%- set call = m.tool_calls[0] %}
        {{- '[TOOL_CALLS] [{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + ', "id": "' + call.id + '"}]' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' }}
        {{- m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""


def test_mistral_s_format_is_read() -> None:
    made = templates.tokenizer(MISTRAL)
    tags = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    made.add_tokens(tags, special_tokens=True)
    chat = Chat(made, models_page.TOOLS)
    assert chat.format is not None
    assert chat.format.parser == "mistral"

    def read(text: str) -> Parsed:
        return chat.parse(made(text, add_special_tokens=False)["input_ids"])

    call = (
        '[TOOL_CALLS] [{"name": "search_shop", "arguments": {"query": "tea"}, "id": "abcdefghi"}]'
    )
    assert query(read(call)) == "tea"
    assert read(call[:-30]).error
    assert read("[TOOL_CALLS] nonsense").error
    assert is_answer(read("I need no [TOOL_CALLS] here."))


def test_a_parser_can_be_named(tmp_path: Path) -> None:
    made = templates.tokenizer(templates.text("qwen3_5_nothink"))
    chat = Chat(made, models_page.TOOLS, tool_parser="qwen3_xml")
    assert chat.format is not None
    assert chat.format.parser == "qwen3_xml"
    with pytest.raises(ValueError, match=r"model\.tool_parser='nothing': no such parser; use her"):
        Chat(made, models_page.TOOLS, tool_parser="nothing")
    with pytest.raises(ValueError, match=r"model\.tool_parser='hf': vLLM's parser does not take"):
        Chat(made, models_page.TOOLS, tool_parser="hf")
    with pytest.raises(ValueError, match="call of add_item that is not read"):
        Chat(made, models_page.TOOLS, tool_parser="lfm2")


def test_the_page_of_models_is_up_to_date() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == models_page.page(), "python -m tests.models_page > docs/models.md"
