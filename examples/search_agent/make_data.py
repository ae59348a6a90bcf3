"""Writes the corpus, the questions about it, and demonstrations whose queries are now and then too
vague to find the right passage."""

import json
from pathlib import Path
from random import Random

from elpo_ray.tools.search import Corpus

HERE = Path(__file__).parent
SYSTEM = "Search the corpus, then answer with one word."
FACTS = {"capital": "The capital is", "river": "Its longest river is", "metal": "Its mines hold"}
ANSWERS = {
    "capital": ["Arbel", "Brino", "Cadra", "Delm", "Ostia", "Perth", "Quill", "Rovno"],
    "river": ["Ansa", "Brook", "Drava", "Neva", "Oder", "Piave", "Volta", "Yana"],
    "metal": ["copper", "gold", "iron", "lead", "nickel", "silver", "tin", "zinc"],
}
FIRST, LAST = ("Nor", "Sud", "Est", "Wes", "Mid", "Lor"), ("land", "mark", "stan", "via", "ria")


def main() -> None:
    random = Random(0)
    countries = [first + last for first in FIRST for last in LAST]
    answer = {c: {fact: random.choice(ANSWERS[fact]) for fact in FACTS} for c in countries}
    texts = [
        " ".join(f"{FACTS[fact]} {answer[country][fact]}." for fact in FACTS)
        for country in countries
    ]
    corpus = Corpus(countries, texts)
    rows = []
    for country in countries:
        for fact in FACTS:
            question = {"role": "user", "content": f"What is the {fact} of {country}?"}
            prompt = [{"role": "system", "content": SYSTEM}, question]
            rows.append({"prompt": prompt, "answer": answer[country][fact], "country": country})
    random.shuffle(rows)
    demonstrations = [demonstration(corpus, row, random) for row in rows[20:] * 2]
    passages = [{"title": c, "text": t} for c, t in zip(countries, texts, strict=True)]
    write("corpus", passages)
    write("train", rows[20:])
    write("eval", rows[:20])
    write("demonstrations", demonstrations)


def demonstration(corpus: Corpus, row: dict, random: Random) -> dict:
    query = random.choice([row["country"], row["country"], "country"])
    function = {"name": "search", "arguments": {"query": query}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    found = corpus.best(query, 1)
    lines = [f"[1] {corpus.titles[place]}\n{corpus.texts[place]}" for place in found]
    said = {"role": "tool", "content": lines[0] if lines else NOTHING}
    answer = {"role": "assistant", "content": row["answer"]}
    return {"messages": [*row["prompt"], call, said, answer]}


NOTHING = "No passage has any of these words."


def write(name: str, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
