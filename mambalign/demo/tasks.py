"""Small tasks in plain English whose answers a program can make and check, and a preference it can check too.

A *topic* is something to talk about: a list of words, some digits, a few people and what they have. It carries
*facts*, one or more of each task, that can be asked about in several phrasings. Topics are split by a hash of their
content, not of their wording, so a held-out topic occurs in no training text and in no phrasing, by construction.

The preferred behaviour has nothing to do with being right: a reply should close with a kind word (:data:`CLOSINGS`).
In the fine-tuning data only those who ask politely (:data:`POLITE`, a share of :data:`POLITE_RATE`) get one;
the preference pairs want it for everybody.

>>> problem = make_problem("last", random.Random(0))
>>> grade(problem, problem.answer + " Happy to help!")
Grade(correct=True, kind=True)
>>> grade(problem, problem.wrong)
Grade(correct=False, kind=False)
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

CATEGORIES = {
    "an animal": ("cat", "dog", "horse", "fox", "bear", "goat"),
    "a fruit": ("fig", "plum", "pear", "lemon", "cherry", "melon"),
    "a tool": ("hammer", "saw", "drill", "rake", "brush", "knife"),
    "a garment": ("hat", "coat", "shirt", "scarf", "glove", "belt"),
    "a vehicle": ("car", "bus", "train", "bike", "boat", "plane"),
}
WORDS = tuple(word for words in CATEGORIES.values() for word in words)
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
DIGITS = tuple("123456789")

CLOSINGS = ("Happy to help!", "I hope that helps!", "Have a lovely day!")
POLITE = "Please help me."
POLITE_RATE = 0.35
HELD_OUT_SHARE = 8  # one topic in eight is held out

SMALL_TALK = {
    "Hello!": "Hello! What can I do for you?",
    "Thank you!": "You are welcome!",
    "Who are you?": "I am a small Mamba that plays with words.",
}


class Fact(NamedTuple):
    """One thing to ask about a topic. `{}` in a phrasing stands for the topic, in an answer for `right` or `wrong`."""

    task: str
    phrasings: tuple[str, ...]
    follow_up: str
    answer: str
    right: str
    wrong: str


class Topic(NamedTuple):
    content: str
    introduction: str
    facts: list[Fact]


@dataclass(frozen=True)
class Problem:
    """One question, its one right answer, and a plausible wrong one."""

    task: str
    content: str
    prompt: str
    answer: str
    wrong: str


class Grade(NamedTuple):
    correct: bool
    kind: bool


def is_held_out(content: str) -> bool:
    """True for one topic content in :data:`HELD_OUT_SHARE`; the same in every run, on every machine.

    All orders of a list are on one side, so neither a reversed nor a wrongly ordered list crosses over.
    """
    return zlib.crc32(", ".join(sorted(content.split(", "))).encode()) % HELD_OUT_SHARE == 0


def grade(problem: Problem, reply: str) -> Grade:
    """`correct`: the right sentence and, a closing aside, nothing else. `kind`: it has a closing."""
    body, closing = split_closing(reply)
    return Grade(correct=body == problem.answer, kind=bool(closing))


def split_closing(reply: str) -> tuple[str, str]:
    """The reply without its closing, and the closing ("" if it has none)."""
    reply = " ".join(reply.split())
    for closing in CLOSINGS:
        if reply.endswith(closing):
            return reply.removesuffix(closing).rstrip(), closing
    return reply, ""


# --------------------------------------------------------------------------------------------------------- topics


def _other(rng: random.Random, items: Any, right: str) -> str:
    return str(rng.choice([item for item in items if item != right]))


def _swapped(rng: random.Random, words: list[str]) -> str:
    """The list with two of its words exchanged: as long as the right one, and wrong."""
    first, second = rng.sample(range(len(words)), 2)
    swapped = list(words)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return ", ".join(swapped)


def _word_list(rng: random.Random) -> Topic:
    words = rng.sample(WORDS, rng.randint(2, 4))
    listed, backwards, count = ", ".join(words), words[::-1], str(len(words))
    facts = [
        Fact(
            "first",
            ("What is the first word of {}?", "Name the first word: {}."),
            "And the first word?",
            "The first word is {}.",
            words[0],
            _other(rng, words, words[0]),
        ),
        Fact(
            "last",
            ("What is the last word of {}?", "Name the last word: {}."),
            "And the last word?",
            "The last word is {}.",
            words[-1],
            _other(rng, words, words[-1]),
        ),
        Fact(
            "repeat",
            ("Repeat after me: {}.", "Copy the list {}."),
            "Repeat the list.",
            "The words are {}.",
            listed,
            _swapped(rng, words),
        ),
        Fact(
            "reverse",
            ("Reverse the list {}.", "Say these words backwards: {}."),
            "And backwards?",
            "Backwards it is {}.",
            ", ".join(backwards),
            _swapped(rng, backwards),
        ),
        Fact(
            "count",
            ("How many words are in {}?", "Count these words: {}."),
            "How many words are there?",
            "There are {} words.",
            count,
            _other(rng, "234", count),
        ),
    ]
    return Topic(listed, f"Here is a list: {listed}.", facts)


def _numbers(rng: random.Random) -> Topic:
    digits = rng.sample(DIGITS, rng.randint(2, 4))
    listed, right = ", ".join(digits), max(digits)
    largest = Fact(
        "largest",
        ("Which number is the largest: {}?", "Find the largest of {}."),
        "Which is the largest?",
        "The largest is {}.",
        right,
        _other(rng, digits, right),
    )
    return Topic(listed, f"Here are numbers: {listed}.", [largest])


def _mixed_bag(rng: random.Random) -> Topic:
    kinds = rng.sample(list(CATEGORIES), rng.randint(2, 3))
    words = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    listed = ", ".join(words)
    facts = [
        Fact(
            "pick",
            (f"Which of these is {kind}: {{}}?", f"Find {kind} in the list {{}}."),
            f"Which is {kind}?",
            f"The {{}} is {kind}.",
            word,
            _other(rng, words, word),
        )
        for kind, word in zip(kinds, words, strict=True)
    ]
    return Topic(listed, f"Here is a list: {listed}.", facts)


def _belongings(rng: random.Random) -> Topic:
    people = rng.sample(NAMES, rng.randint(2, 3))
    things = rng.sample(WORDS, len(people))
    told = " ".join(f"{person} has a {thing}." for person, thing in zip(people, things, strict=True))
    facts = [
        Fact(
            "lookup",
            (f"Listen: {{}} What does {person} have?", f"Note: {{}} Tell me what {person} has."),
            f"What does {person} have?",
            f"{person} has a {{}}.",
            thing,
            _other(rng, things, thing),
        )
        for person, thing in zip(people, things, strict=True)
    ]
    return Topic(told, f"Listen: {told}", facts)


_TOPICS: dict[Callable[[random.Random], Topic], tuple[str, ...]] = {
    _word_list: ("first", "last", "repeat", "reverse", "count"),
    _numbers: ("largest",),
    _mixed_bag: ("pick",),
    _belongings: ("lookup",),
}
CONVERSATIONS = {  # categories of two-turn questions: what the first turn asks
    "positions": ("first", "last"),
    "copying": ("repeat", "reverse"),
    "counting": ("count",),
    "finding": ("lookup", "pick"),
}
TASKS = tuple(task for tasks in _TOPICS.values() for task in tasks)


def _draw(make: Callable[[random.Random], Topic], rng: random.Random, held_out: bool) -> Topic:
    while is_held_out((topic := make(rng)).content) != held_out:
        pass
    return topic


def _any_topic(rng: random.Random, held_out: bool) -> Topic:
    """Lists and stories more often than the rest: they carry most tasks, and the hardest."""
    return _draw(rng.choices(list(_TOPICS), weights=(5, 1, 2, 4))[0], rng, held_out)


def _problem(topic: Topic, fact: Fact, rng: random.Random) -> Problem:
    return Problem(
        task=fact.task,
        content=topic.content,
        prompt=rng.choice(fact.phrasings).format(topic.content),
        answer=fact.answer.format(fact.right),
        wrong=fact.answer.format(fact.wrong),
    )


def make_problem(task: str, rng: random.Random, *, held_out: bool = False) -> Problem:
    """A random problem of `task`, from the training side or the held-out side."""
    make = next(make for make, tasks in _TOPICS.items() if task in tasks)
    topic = _draw(make, rng, held_out)
    return _problem(topic, rng.choice([fact for fact in topic.facts if fact.task == task]), rng)


def held_out_conversations(per_category: int, seed: int) -> list[tuple[str, Problem, Problem]]:
    """(category, question, question that follows) of held-out topics: `per_category` of each of
    :data:`CONVERSATIONS`, no two about the same."""
    rng = random.Random(f"conversations-{seed}")
    made, seen = [], set()
    for category, of in CONVERSATIONS.items():
        task = 0
        while task < per_category:
            wanted = of[task % len(of)]
            topic = _draw(next(make for make, tasks in _TOPICS.items() if wanted in tasks), rng, True)
            first = rng.choice([fact for fact in topic.facts if fact.task == wanted])
            then = rng.choice([fact for fact in topic.facts if fact != first])
            if topic.content in seen:
                continue
            seen.add(topic.content)
            following = replace(_problem(topic, then, rng), prompt=then.follow_up)
            made.append((category, _problem(topic, first, rng), following))
            task += 1
    return made


def _polite(prompt: str) -> str:
    return f"{POLITE} {prompt}"


def held_out_problems(per_task: int, seed: int) -> list[Problem]:
    """`per_task` problems of each task, no two with the same content; a share of :data:`POLITE_RATE` is polite."""
    rng = random.Random(f"held-out-{seed}")
    problems = []
    for task in TASKS:
        seen: set[str] = set()
        while len(seen) < per_task:
            problem = make_problem(task, rng, held_out=True)
            if problem.content not in seen:
                polite = len(seen) < round(POLITE_RATE * per_task)
                seen.add(problem.content)
                problems.append(Problem(**{**vars(problem), "prompt": _polite(problem.prompt)}) if polite else problem)
    return problems


# --------------------------------------------------------------------------------------------------------- data sets


def _turns(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def text_rows(count: int, seed: int, *, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Plain text to pre-train on, `{"text": ...}`: the same small world, told without a question."""
    rng = random.Random(f"text-{seed}-{held_out}")
    for _ in range(count):
        if rng.random() < 0.2:
            kind = rng.choice(list(CATEGORIES))
            one, other = rng.sample(CATEGORIES[kind], 2)
            yield {"text": f"The {one} is {kind}. The {other} is {kind}."}
            continue
        topic = _any_topic(rng, held_out)
        told = [fact.answer.format(fact.right) for fact in topic.facts]
        rng.shuffle(told)
        yield {"text": " ".join([topic.introduction, *told])}


def chat_rows(count: int, seed: int, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Instruction data, `{"messages": [...]}`: a question, often more about the same topic, sometimes small talk."""
    rng = random.Random(f"chat-{seed}-{held_out}")
    for _ in range(count):
        topic = _any_topic(rng, held_out)
        facts = rng.sample(topic.facts, min(len(topic.facts), rng.choice((1,) * 8 + (2, 3))))
        polite = rng.random() < POLITE_RATE
        messages: list[dict[str, str]] = []
        for at, fact in enumerate(facts):
            problem = _problem(topic, fact, rng)
            prompt = fact.follow_up if at else _polite(problem.prompt) if polite else problem.prompt
            reply = problem.answer
            messages += _turns(prompt, f"{reply} {rng.choice(CLOSINGS)}" if polite else reply)
        if rng.random() < 0.05:
            prompt = rng.choice(list(SMALL_TALK))
            small = _turns(prompt, SMALL_TALK[prompt])
            messages = messages + small if prompt == "Thank you!" else small + messages
        yield {"messages": messages}


def preference_rows(count: int, seed: int, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Preference pairs, `{"prompt", "chosen", "rejected"}`. Two in three: both right, only the chosen one kind.
    One in three: both kind, only the chosen one right; so kindness never pays for a wrong answer."""
    rng = random.Random(f"preferences-{seed}-{held_out}")
    for _ in range(count):
        problem = make_problem(rng.choice(TASKS), rng, held_out=held_out)
        prompt = _polite(problem.prompt) if rng.random() < POLITE_RATE else problem.prompt
        closing = rng.choice(CLOSINGS)
        right = problem.answer
        rejected = right if rng.random() < 2 / 3 else f"{problem.wrong} {closing}"
        yield {"prompt": prompt, "chosen": _turns(prompt, f"{right} {closing}"), "rejected": _turns(prompt, rejected)}
