"""LangChain's OpenAI classes against a real server, in a process of their own: their warnings are not ours."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.e2e.harness import RealServer

SCRIPT = """
import json, sys
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

url = sys.argv[1] + "/v1"
common = {"base_url": url, "api_key": "none", "model": "lattice"}
chat = ChatOpenAI(**common, max_tokens=8, temperature=0)
said = chat.invoke("Who was there?")
streamed = [chunk.content for chunk in chat.stream("Who was there?")]

class Person(BaseModel):
    age: int = Field(ge=0, le=99)

@tool
def weather(hot: bool) -> str:
    "Whether it is hot."
    return "yes"

person = ChatOpenAI(**common, max_tokens=1500, seed=1).with_structured_output(Person, method="json_schema")
one = {"tool_choice": "required", "parallel_tool_calls": False, "strict": True}
calling = ChatOpenAI(**common, max_tokens=1500, seed=1).bind_tools([weather], **one)
responses = ChatOpenAI(**common, max_tokens=8, temperature=0, use_responses_api=True, use_previous_response_id=True)
answered = responses.invoke("Who was there?")
followed = responses.invoke([("user", "Who was there?"), answered, ("user", "And then?")])
plain = OpenAI(**common, max_tokens=8, temperature=0)
vectors = OpenAIEmbeddings(**common, check_embedding_ctx_length=False)
print(json.dumps({
    "said": said.content,
    "tokens": said.usage_metadata["output_tokens"],
    "streamed": "".join(streamed),
    "person": person.invoke("How old is he?").age,
    "calls": [call["name"] for call in calling.invoke("Is it hot?").tool_calls],
    "answered": answered.content[0]["text"],
    "followed": followed.usage_metadata["input_tokens"] - answered.usage_metadata["total_tokens"],
    "plain": plain.invoke("It was"),
    "plain_streamed": "".join(plain.stream("It was")),
    "vectors": [len(vector) for vector in vectors.embed_documents(["a", "b c"])],
}))
"""


def test_langchain(server: RealServer) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, server.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["said"] == answers["streamed"] == answers["answered"]
    assert answers["followed"] > 0, "the server has put the past before it"
    assert answers["tokens"] == 8
    assert 0 <= answers["person"] <= 99
    assert set(answers["calls"]) == {"weather"}
    assert (
        answers["plain"]
        == answers["plain_streamed"]
        == server.complete("It was", max_tokens=8, temperature=0)["choices"][0]["text"]
    )
    assert answers["vectors"] == [32, 32]
