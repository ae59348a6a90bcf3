"""An OpenAI-compatible server on the loopback, spoken to as if it were an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeTask, FakeTools, Server, make_config, server_says, tool_call

from elpo_ray.rollout.endpoint import Endpoint, served_model
from elpo_ray.rollout.episode import Agent
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.tools import code_interpreter
from elpo_ray.types import FinishReason, InfrastructureError, Sampling, Score


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setattr("elpo_ray.rollout.endpoint.RETRIES", 0)
    return Endpoint(server.url, "m", [code_interpreter.SCHEMA])


SAMPLING = Sampling(temperature=0.7, top_p=0.6, max_tokens=64, seed=2**40 + 5)
QUESTION = [{"role": "user", "content": "How many?"}]


async def test_a_conversation_with_a_call_reaches_the_server_as_it_should(
    server: Server, endpoint: Endpoint
) -> None:
    server.script = [
        server_says(None, tool_call("print(3)"), tokens=9, finish="tool_calls"),
        server_says("three"),
    ]
    prompt = endpoint.prompt_ids(QUESTION)
    turn = await endpoint.generate(prompt, SAMPLING)
    assert (len(turn.token_ids), turn.finish) == (9, FinishReason.STOP)
    parsed = endpoint.parse(turn.token_ids)
    assert parsed.call is not None and parsed.call.arguments == {"code": "print(3)"}
    prefix = [*prompt, *turn.token_ids, *endpoint.observation_ids("3")]
    answer = await endpoint.generate(prefix, SAMPLING)
    assert endpoint.parse(answer.token_ids).text == "three"
    first, second = server.asked
    assert first["tools"] == [code_interpreter.SCHEMA] and first["messages"] == QUESTION
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 0.6, 64)
    assert first["seed"] == 5, "servers take 31 bits"
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    await endpoint.close()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (server_says("", tool_call(), tool_call(id="c2")), "2 calls in one turn"),
        (server_says("", tool_call(arguments="{")), "arguments are not JSON"),
        (server_says("", tool_call(arguments='{"kode": "1"}')), "argument code is missing"),
        (server_says("<tool_call>{}"), "could not be read"),
    ],
)
async def test_a_malformed_call_is_an_observation_of_every_call_of_its_turn(
    server: Server, endpoint: Endpoint, reply: tuple[int, dict[str, Any]], said: str
) -> None:
    server.script = [reply, server_says("done")]
    turn = await endpoint.generate(endpoint.prompt_ids(QUESTION), SAMPLING)
    parsed = endpoint.parse(turn.token_ids)
    assert parsed.call is None and said in (parsed.error or "")
    observed = [*turn.token_ids, *endpoint.observation_ids("no")]
    await endpoint.generate(observed, SAMPLING)
    told = server.asked[1]["messages"][1:]
    calls = reply[1]["choices"][0]["message"].get("tool_calls", [])
    if calls:
        assert [message["tool_call_id"] for message in told] == [c["id"] for c in calls]
    else:
        assert told == [{"role": "user", "content": "no"}]
    await endpoint.close()


async def test_an_answer_may_mention_the_tag(server: Server, endpoint: Endpoint) -> None:
    server.script = [server_says("I need no <tool_call> for this: 7.")]
    turn = await endpoint.generate(endpoint.prompt_ids(QUESTION), SAMPLING)
    parsed = endpoint.parse(turn.token_ids)
    assert (parsed.call, parsed.error) == (None, None)
    await endpoint.close()


async def test_limits_and_faults_keep_their_kinds(server: Server, endpoint: Endpoint) -> None:
    prompt = endpoint.prompt_ids(QUESTION)
    server.script = [
        server_says("cut", finish="length"),
        (400, {"error": {"message": "maximum context length is 10 tokens", "code": 400}}),
        (503, {"error": {"message": "busy"}}),
        (401, {"error": {"message": "no key"}}),
        (400, {"error": {"message": "unknown field"}}),
    ]
    assert (await endpoint.generate(prompt, SAMPLING)).finish is FinishReason.LENGTH
    assert (await endpoint.generate(prompt, SAMPLING)).finish is FinishReason.LENGTH
    with pytest.raises(InfrastructureError, match="busy"):
        await endpoint.generate(prompt, SAMPLING)
    with pytest.raises(ValueError, match="no key"):
        await endpoint.generate(prompt, SAMPLING)
    with pytest.raises(ValueError, match="unknown field"):
        await endpoint.generate(prompt, SAMPLING)
    await endpoint.close()


async def test_a_worker_evaluates_through_it(server: Server, endpoint: Endpoint) -> None:
    class Boxed(FakeTask):
        async def score(self, problem: Any, steps: Any, tools: Any) -> Any:
            return Score(1.0, steps[-1].action_text == "=ok")

    server.script = [server_says(None, tool_call("7"), tokens=4), server_says("=ok", tokens=2)]
    tools = FakeTools(reply=lambda moves: "seven")
    worker = RolloutWorker(endpoint, tools, endpoint, Boxed(), RolloutSettings.of(make_config()))
    assert isinstance(worker.agent, Agent)
    tools.open = _interpreter(tools)  # type: ignore[method-assign]
    sample = await worker.evaluate(worker.task.train_problem(0))
    assert (sample.success, sample.tool_calls, sample.tokens) == (True, 1, 6)
    assert sample.transcript[0]["observation"] == "seven"
    await endpoint.close()


def _interpreter(tools: FakeTools) -> Any:
    """Sessions that take `code` for a move."""
    opened = tools.open

    async def open(**where: Any) -> Any:
        session = await opened(**where)
        run = session.call

        async def call(made: Any) -> Any:
            made.arguments["move"] = made.arguments["code"]
            return await run(made)

        session.call = call  # type: ignore[method-assign]
        return session

    return open


def test_which_model_a_server_has(server: Server) -> None:
    assert served_model(server.url, None) == "m" == served_model(server.url, "m")
    with pytest.raises(ValueError, match=r"served_model='x'.*serves m; name one of them"):
        served_model(server.url, "x")
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match="serves a, b; name one of them"):
        served_model(server.url, None)
    with pytest.raises(ValueError, match="does not list its models"):
        served_model("http://127.0.0.1:9/v1", None)
