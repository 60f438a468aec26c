"""Closed-book question answering from public sets of facts: what the in-house BART and T5 are trained and asked on.

    python -m tpatch_jax.evaluation.closed_book --counterfact FLAT.json --zsre ZSRE.json --knowedit KNOWEDIT.json -o DIR

CounterFact's statements ("The mother tongue of {} is") are turned into questions by their relation; each relation has
six wordings. Written are, as JSON lines of requests:

- ``train.jsonl``: facts to be learnt, CounterFact's in three wordings each, zsRE's and KnowEdit's in their own two;
- ``test.jsonl``: CounterFact facts that are learnt, in one of the wordings that were not used for them;
- ``stream.jsonl``: facts that are not learnt, in a shuffled order, with other wordings as rephrasings: the mistakes.
  zsRE's questions that KnowEdit has as well are learnt, and so not among them.

Answers are the true ones. Everything is drawn from fixed random numbers, so the files are always the same.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.data_files import Entry, read_entries
from tpatch_jax.evaluation.data_notes import reading_notes

__all__ = ["RELATIONS", "Relation", "closed_book"]


class Relation(NamedTuple):
    """Statements that say one relation, and questions that ask for it; ``{}`` is the subject.

    Attributes:
        statements: as CounterFact has them.
        questions: wordings of the question.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: Mapping[str, Relation] = {
    "spoken language": Relation(
        (
            *("{} speaks the language", "{} speaks", "{} spoke the language", "{}, speaker of", "{}, a native"),
            *("The mother tongue of {} is", "The native language of {} is", "{} is a native speaker of"),
        ),
        (
            "What language does {} speak?",
            "Which language is spoken by {}?",
            "In which language does {} talk?",
            "What is the mother tongue of {}?",
            "{} speaks which language?",
            "What is the native language of {}?",
        ),
    ),
    "language of a work": Relation(
        ("The original language of {} is", "The original language of {} was"),
        (
            "In which language was {} made?",
            "What is the original language of {}?",
            "Which language is {} in?",
            "What language was {} originally in?",
            "The original language of {} is which one?",
            "In what language did {} first appear?",
        ),
    ),
    "citizenship": Relation(
        (
            *("{} holds a citizenship from", "{} has a citizenship from", "{}, a citizen of", "{} is a citizen of"),
            *("{}, who is a citizen of", "{}, who has a citizenship from", "{}, who holds a citizenship from"),
        ),
        (
            "Which country is {} a citizen of?",
            "What is the citizenship of {}?",
            "{} is a citizen of what country?",
            "Of which country does {} hold citizenship?",
            "What country issued the passport of {}?",
            "What nationality does {} have?",
        ),
    ),
    "continent": Relation(
        ("{} is located in the continent", "{} belongs to the continent of", "{} is a part of the continent of"),
        (
            "On which continent is {}?",
            "What continent does {} belong to?",
            "{} is on what continent?",
            "Which continent is {} a part of?",
            "In which part of the world is {}?",
            "What is the continent of {}?",
        ),
    ),
    "position": Relation(
        (
            *("{}, who plays the position", "{} plays as", "{} plays in the position of"),
            "Which position does {} play? They play as",
        ),
        (
            "What position does {} play?",
            "Which position is {} in on the field?",
            "{} plays in what position?",
            "In which position does {} play?",
            "What is the position of {} in the team?",
            "As what does {} play?",
        ),
    ),
    "maker": Relation(
        (
            *("{}, created by", "{}, developed by", "{} is created by", "{} is developed by", "{} is a product of"),
            *("{} is produced by", "{}, produced by"),
        ),
        (
            "Who made {}?",
            "Which company created {}?",
            "What company is behind {}?",
            "Who is the maker of {}?",
            "{} was produced by whom?",
            "Which firm developed {}?",
        ),
    ),
    "place of death": Relation(
        ("{} died at", "{} died in the city of", "{} died in", "{}'s life ended in", "{} passed away in"),
        (
            "Where did {} die?",
            "In which city did {} die?",
            "What is the place of death of {}?",
            "{} died in what city?",
            "Where did the life of {} end?",
            "In what city did {} pass away?",
        ),
    ),
    "place of birth": Relation(
        ("{} was born in", "{} is native to", "{} was native to", "{} is originally from", "{} was originally from"),
        (
            "Where was {} born?",
            "In which city was {} born?",
            "What is the birthplace of {}?",
            "Where does {} come from?",
            "{} was born in what place?",
            "From which city is {} originally?",
        ),
    ),
    "headquarters": Relation(
        (
            *("The headquarter of {} is located in", "The headquarters of {} is in", "{} is based in"),
            *("{}, whose headquarters are in", "{}'s headquarters are in", "The headquarter of {} is in"),
        ),
        (
            "Where are the headquarters of {}?",
            "In which city is {} based?",
            "Where is {} headquartered?",
            "{} has its headquarters in what city?",
            "What city is home to {}?",
            "In what city is the head office of {}?",
        ),
    ),
    "occupation": Relation(
        (
            *("The occupation of {} is", "{} works as", "{}'s profession is a", "{}, who works as"),
            *("{}'s profession is an", "The profession of {} is", "{}'s occupation is"),
        ),
        (
            "What is the occupation of {}?",
            "What does {} do for a living?",
            "What is the job of {}?",
            "{} works as what?",
            "What profession does {} have?",
            "By profession, what is {}?",
        ),
    ),
    "twin city": Relation(
        ("{} is a twin city of", "What is the twin city of {}? It is", "The twin city of {} is"),
        (
            "What is the twin city of {}?",
            "Which city is {} twinned with?",
            "{} has which twin town?",
            "What city is the twin of {}?",
            "With which city is {} paired?",
            "Name the twin city of {}.",
        ),
    ),
    "broadcaster": Relation(
        ("{} debuted on", "{} premieres on", "{} was originally aired on", "{} is to debut on", "{} premiered on"),
        (
            "On which channel did {} first air?",
            "What network showed {} first?",
            "{} premiered on what channel?",
            "Which channel broadcast {}?",
            "Where did {} make its debut?",
            "What was the original network of {}?",
        ),
    ),
    "religion": Relation(
        ("{} follows the religion of", "The official religion of {} is", "{} is follower of"),
        (
            "What is the religion of {}?",
            "Which religion does {} follow?",
            "{} is a follower of what religion?",
            "What faith does {} have?",
            "To which religion does {} belong?",
            "What does {} believe in?",
        ),
    ),
}

_Fact = dict[str, str]

TRAINED, HELD_OUT = 3, 0.12
QUESTIONS_HELD_OUT = 250
OTHER_WORDINGS = 3


def _facts(path: str | Path, data: str, fields: Sequence[str], answer: str, strict: bool) -> list[tuple[int, _Fact]]:
    """The facts of a file with their positions in it; a record that lacks something is passed over, and told."""

    def parse(entry: Entry) -> tuple[int, _Fact]:
        return entry.position, {**{name: entry.text(name) for name in fields}, answer: entry.answers(answer)[0]}

    with reading_notes(path, strict, None) as notes:
        try:
            entries = read_entries(path, data, notes)
        except TPatchError as error:
            raise TPatchError(f"{path} cannot be read: {error}") from None
        return notes.read_each(entries, parse)


def _by_relation(rows: Sequence[_Fact]) -> dict[tuple[str, str], str]:
    """The answer of every subject and relation; where a set contradicts itself the first answer stands."""
    known = {statement: name for name, relation in RELATIONS.items() for statement in relation.statements}
    truths: dict[tuple[str, str], str] = {}
    for row in rows:
        name = known.get(row["prompt"].replace(row["subject"], "{}"))
        if name is not None:
            truths.setdefault((row["subject"], name), row["ground_truth"])
    return truths


def _plain(question: str) -> str:
    return " ".join(question.lower().split())


def closed_book(
    counterfact: str | Path, zsre: str | Path, knowedit: str | Path, *, strict: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Questions with their true answers: what is learnt, what is asked, and what is not known.

    Args:
        counterfact: CounterFact, flattened, the training slice.
        zsre: zsRE in MEND's schema.
        knowedit: KnowEdit's zsRE rows.
        strict: a record that cannot be read is an error; by default it is passed over, and the log says so.

    Returns:
        ``train``, ``test`` and ``stream``: requests as dictionaries.

    Raises:
        TPatchError: a file cannot be read, or is of another data set.
    """
    rng = np.random.default_rng(0)
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "stream": []}
    facts = [row for _, row in _facts(counterfact, "counterfact", ("subject", "prompt"), "ground_truth", strict)]
    for number, ((subject, name), answer) in enumerate(_by_relation(facts).items()):
        order = rng.permutation(len(RELATIONS[name].questions))
        asked = [RELATIONS[name].questions[pick].replace("{}", subject) for pick in order]
        if rng.random() < HELD_OUT:
            entry = {"id": f"cf-{number}", "prompt": asked[0], "target": answer, "subject": subject}
            sets["stream"].append({**entry, "rephrases": asked[1 : 1 + OTHER_WORDINGS]})
        else:
            sets["train"] += [{"prompt": question, "target": answer} for question in asked[:TRAINED]]
            sets["test"].append({"id": f"cf-{number}", "prompt": asked[TRAINED], "target": answer})
    for _, row in _facts(knowedit, "knowedit", ("prompt", "rephrase_prompt"), "ground_truth", strict):
        answer = row["ground_truth"]
        sets["train"] += [{"prompt": row[name], "target": answer} for name in ("prompt", "rephrase_prompt")]
    seen: set[str] = set()
    for number, row in _facts(zsre, "zsre", ("subject", "src", "rephrase"), "answers", strict):
        answer, fresh = row["answers"], row["subject"] not in seen
        seen.add(row["subject"])
        if fresh and number >= QUESTIONS_HELD_OUT:
            entry = {"id": f"zsre-{number}", "prompt": row["src"], "target": answer, "subject": row["subject"]}
            # Some rows leave the subject out of the question, or say it twice.
            if row["src"].count(row["subject"]) != 1:
                del entry["subject"]
            sets["stream"].append({**entry, "rephrases": [row["rephrase"]]})
        elif number < QUESTIONS_HELD_OUT:
            sets["train"] += [{"prompt": row[name], "target": answer} for name in ("src", "rephrase")]
    learnt = {_plain(row["prompt"]) for row in sets["train"]}
    shuffled = [sets["stream"][pick] for pick in rng.permutation(len(sets["stream"]))]
    sets["stream"] = [row for row in shuffled if learnt.isdisjoint(map(_plain, (row["prompt"], *row["rephrases"])))]
    return sets


def _main(
    counterfact: str,
    zsre: str,
    knowedit: str,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], help="the folder to write")],
    strict: Annotated[bool, tyro.conf.arg(help="a record that cannot be read is an error")] = False,
) -> None:
    folder = Path(output)
    try:
        sets = closed_book(counterfact, zsre, knowedit, strict=strict)
        folder.mkdir(parents=True, exist_ok=True)
    except (TPatchError, OSError) as error:
        sys.exit(str(error))
    for name, rows in sets.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} questions")


if __name__ == "__main__":
    tyro.cli(_main)
