"""Twelve questions with the skeleton profile beside the plain answer, as lines of JSON.

One line of JSON for every question: whether the answer forked or is the plain one, its paths'
titles, its script, points that were cut in a sentence or end on a colon, and the conclusion. The
first six ask for one short thing, three more are not in English, and the last three want a list.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.bench.engine import make_llm
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile

QUESTIONS = (
    "Hello!",
    "Is 17 a prime number? Answer yes or no.",
    "What is the capital of France?",
    "Anna has 12 apples, gives away 5 and buys 9. How many has she now?",
    "Write a Python function that says whether a string is a palindrome.",
    "Give me a JSON object with name Tom and age 30.",
    "Как выучить английский язык быстрее?",
    "怎样才能睡得更好?",
    "Welche Vorteile hat ein Garten?",
    "Compare Python and C++.",
    "How do I stay healthy?",
    "How do I make a SQL query faster?",
)
HEADING = re.compile(r"^(?:\*\*)?(\d+)\. (?:\*\*)?([^\n]*?)\*\*:?", re.MULTILINE)
SENTENCE_END = re.compile(r"(?:[.!?…。！？;；)\]`|]|\*\*)$")


def script_of(text: str) -> str:
    """Return the script that most letters are of, as Unicode calls it."""
    letters = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return letters.most_common(1)[0][0] if letters else ""


def points_of(text: str, profile: Profile) -> tuple[list[str], list[str], str]:
    """Return the titles and texts of an answer's points, and the conclusion behind them."""
    starts = [profile.join.start, *(rule.start for rule in profile.join.starts)]
    begin = "|".join(re.escape("".join(map(str, start)).strip()) for start in starts)
    found = list(re.finditer(rf"^(?:{begin})", text, re.MULTILINE))
    end = found[-1].start() if found else len(text)
    text, conclusion = text[:end], text[end:]
    heads = list(HEADING.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bodies = [text[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)]
    return [head[2] for head in heads], bodies, conclusion


def report(question: str, plain: str, output: Any, profile: Profile) -> dict[str, Any]:
    """Say what became of one question."""
    text = output.outputs[0].text
    summary = (output.kv_transfer_params or {}).get("parallel_think", {})
    row: dict[str, Any] = {"question": question, "forks": summary.get("forks", 0)}
    # The plain answer may be shorter: its budget is what is compared.
    row |= {"as_plain": text.startswith(plain), "script": script_of(text)}
    if not row["forks"]:
        return row
    titles, bodies, conclusion = points_of(text, profile)
    row |= {
        "paths": summary["paths"],
        "different": len({title.casefold() for title in titles}),
        "on_colon": sum(body.endswith((":", "：")) for body in bodies),
        "cut": sum(not SENTENCE_END.search(body) for body in bodies),
        "ratio": summary["parallelism_ratio"],
        "titles": titles,
        "conclusion": conclusion,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", default="skeleton", help="name, or path of a .toml file")
    parser.add_argument("--max-tokens", type=int, default=1200)
    parser.add_argument("--plain-tokens", type=int, default=400, help="of the plain answers")
    parser.add_argument("--questions", type=int, nargs="+", help="numbers from 1; default: all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", action="store_true", help="print both answers, too")
    args = parser.parse_args()
    llm = make_llm(
        args.model, {"profile": args.profile}, max_model_len=4096, dtype=args.dtype, max_num_seqs=64
    )
    profile = load_profile(args.profile)
    assert isinstance(profile, Profile)
    asked = [QUESTIONS[number - 1] for number in args.questions or range(1, 13)]
    texts: dict[str, str] = {}
    ours: dict[str, Any] = {}
    for question, is_plain, output in answers(llm, asked, args.max_tokens, args.plain_tokens):
        if is_plain:
            texts[question] = output.outputs[0].text
        else:
            ours[question] = output
        if question in texts and question in ours:
            row = report(question, texts[question], ours[question], profile)
            print(json.dumps(row, ensure_ascii=False), flush=True)
            if args.texts:
                text = ours[question].outputs[0].text
                print(f"--- plain\n{texts[question]}\n--- {args.profile}\n{text}\n", flush=True)


def answers(
    llm: Any, questions: list[str], max_tokens: int, plain_tokens: int
) -> Iterator[tuple[str, bool, Any]]:
    """Ask every question both ways at once; yield question, whether it is plain, and the answer."""
    from vllm import SamplingParams

    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    asked: dict[str, tuple[str, bool]] = {}
    for question in questions:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
        for is_plain in (True, False):
            request_id = str(len(asked))
            asked[request_id] = (question, is_plain)
            extra = {"parallel_think": "off"} if is_plain else {}
            budget = plain_tokens if is_plain else max_tokens
            params = SamplingParams(temperature=0, max_tokens=budget, extra_args=extra)
            engine.add_request(request_id, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                yield *asked[output.request_id], output


if __name__ == "__main__":
    main()
