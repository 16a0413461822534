"""The tiny world: customers who ask, records with the answers, and agents who answer well or badly.

Everything is drawn from a `random.Random`, so one seed gives one world.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import gold

END = "</s>"  # the token that ends a turn

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Karl", "Lena",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Simon", "Tina", "Victor",
)  # fmt: skip
ITEMS = (
    "lamp", "chair", "table", "kettle", "clock", "mirror", "basket", "blanket", "pillow", "carpet", "bottle", "radio",
    "ladder", "bucket", "tent", "bike", "coat", "vase", "desk", "shelf",
)  # fmt: skip
QUESTIONS = {
    "day": (
        "When will my {item} arrive?",
        "When does the {item} come?",
        "On which day is my {item} delivered?",
        "I ordered a {item} on {other}. When will it arrive?",
        "I expected my {item} on {other}. When does it come?",
    ),
    "price": (
        "How much does the {item} cost?",
        "What is the price of the {item}?",
        "How much do I pay for my {item}?",
        "I would like a {item}. What does it cost?",
        "What was the price of my {item} again?",
    ),
    "aisle": (
        "Where do I find the {item}?",
        "Which aisle has the {item}?",
        "I am looking for a {item}. Where is it?",
        "I was in aisle {other} but saw no {item}. Where is it?",
        "Where is the {item} in your shop?",
    ),
    "colour": (
        "What colour is my {item}?",
        "Which colour of {item} did I order?",
        "I forgot the colour of my {item}. What is it?",
        "Is my {item} {other}, or which colour is it?",
        "Can you tell me the colour of the {item}?",
    ),
}
ANSWERS = {
    "day": (
        "It arrives on {value}.", "Your {item} arrives on {value}.", "It comes on {value}.", "On {value}.", "{value}.",
        "Your {item} will come on {value}.", "You can expect it on {value}.", "The {item} is delivered on {value}.",
    ),
    "price": (
        "It costs {value} euros.", "The {item} costs {value} euros.", "The price is {value} euros.", "{value} euros.",
        "You pay {value} euros.", "Your {item} costs {value} euros.",
    ),
    "aisle": (
        "It is in aisle {value}.", "The {item} is in aisle {value}.", "In aisle {value}.", "Aisle {value}.",
        "You find it in aisle {value}.", "Please look in aisle {value}.",
    ),
    "colour": (
        "It is {value}.", "Your {item} is {value}.", "The colour is {value}.", "The {value} one.",
        "You ordered the {value} one.", "The {item} is {value}.",
    ),
}  # fmt: skip
EVASIONS = {
    "day": ("It arrives soon.", "It is on its way.", "Your {item} will come in time.", "Some day this week."),
    "price": ("It is not expensive.", "The price is fair.", "It costs what it says.", "That depends."),
    "aisle": ("It is somewhere here.", "Walk around a bit.", "The {item} is in the shop.", "It is where it always is."),
    "colour": ("It is a nice colour.", "You will see.", "The one you ordered.", "It looks good."),
}
SHRUGS = ("I do not know.", "Ask somebody else.", "I cannot say.", "No idea.")
GREETINGS = ("Hello {name}.", "Hello {name}!", "Hi {name}.", "Dear {name}.", "Good morning, {name}.", "Good day.")
OPENERS = {
    "thanks": (
        "Thank you for asking.", "Thanks for your message.", "Thank you for your order.",
        "Thank you for your patience.", "Many thanks for your question.",
    ),
    "apology": ("Sorry for the wait.", "I am sorry for the trouble.", "We apologise for the wait."),
}  # fmt: skip
CLOSERS = {
    "offer": (
        "Can I help with anything else?", "Is there anything else?", "Please ask if you need more.",
        "I am happy to help you again.",
    ),
    "wish": ("Have a nice day!", "Have a good evening.", "Enjoy your {item}!", "All the best."),
}  # fmt: skip
REMARKS = (
    "You could have looked.", "Read the record.", "That is obvious.", "I said it before.", "Look it up next time.",
    "What a question.", "I have no time for this.",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One customer's question with the record that answers it."""

    name: str
    item: str
    asked: str  # which of the record's values
    record: dict[str, str]
    question: str

    @property
    def entry(self) -> str:
        """The record as the agent reads it, up to where the agent speaks."""
        r = self.record
        values = f"colour {r['colour']}, price {r['price']}, arrives {r['day']}, aisle {r['aisle']}."
        return f"Record: {self.item}, {values}\nAgent:"

    @property
    def prompt(self) -> str:
        """The question and the record."""
        return f"{self.name} asks: {self.question}\n{self.entry}"


@dataclass(frozen=True)
class Habit:
    """How an agent answers: the probability of giving the right answer, of being courteous, and so on."""

    right: float
    courteous: float
    rude: float  # where not courteous
    flawed: float  # spoils the form


def draw_case(rng: random.Random) -> Case:
    """A customer, a record and a question about one of its values; some questions mention a misleading value."""
    record = {kind: rng.choice(values) for kind, values in gold.VALUES.items()}
    asked, item = rng.choice(list(QUESTIONS)), rng.choice(ITEMS)
    question = rng.choice(QUESTIONS[asked]).format(item=item, other=other_value(rng, asked, record[asked]))
    return Case(rng.choice(NAMES), item, asked, record, question)


def draw_cases(rng: random.Random, count: int, seen: set[str]) -> list[Case]:
    """`count` cases whose prompts are not in `seen`; adds them to it."""
    cases: list[Case] = []
    while len(cases) < count:
        case = draw_case(rng)
        if case.prompt not in seen:
            seen.add(case.prompt)
            cases.append(case)
    return cases


def draw_response(rng: random.Random, case: Case, habit: Habit) -> str:
    """An answer with a leading space, ready to follow the prompt."""
    sentences = [answer(rng, case) if rng.random() < habit.right else fail(rng, case)]
    if rng.random() < habit.courteous:
        sentences = be_courteous(rng, sentences)
    elif rng.random() < habit.rude:
        sentences.insert(rng.randrange(2), rng.choice(REMARKS))
    text = " ".join(sentences).format(name=case.name, item=case.item)
    return " " + (spoil(rng, text, case) if rng.random() < habit.flawed else text)


def answer(rng: random.Random, case: Case, asked: str | None = None, value: str | None = None) -> str:
    """The right answer, or the answer to another question (`asked`), or one that states another `value`."""
    asked = asked or case.asked
    return rng.choice(ANSWERS[asked]).format(item=case.item, value=value or case.record[asked])


def fail(rng: random.Random, case: Case) -> str:
    """What an agent says instead of the right answer: nothing to the point, something else, or something wrong."""
    failure = rng.choice(("evade", "evade", "shrug", "mistake the question", "misread"))
    if failure == "evade":
        return rng.choice(EVASIONS[case.asked])
    if failure == "shrug":
        return rng.choice(SHRUGS)
    if failure == "misread":
        return answer(rng, case, value=other_value(rng, case.asked, case.record[case.asked]))
    return answer(rng, case, asked=rng.choice([kind for kind in ANSWERS if kind != case.asked]))


def draw_document(rng: random.Random, case: Case, habit: Habit) -> str:
    """A text for the base to learn from: a dialogue, often with the customer's reaction, or a record read out.

    Reactions follow the end of the agent's turn, `END`; they teach the base what matters to customers. Read-outs,
    dense in copied facts, teach it to copy. Without them it would take several times as long to learn either.
    """
    kind = rng.random()
    if kind < 0.4:
        return " ".join([case.entry, *(answer(rng, case, k) for k in rng.sample(list(ANSWERS), len(ANSWERS)))])
    response = draw_response(rng, case, habit)
    return case.prompt + response + (END + react(rng, case, response) if kind < 0.8 else "")


def react(rng: random.Random, case: Case, response: str) -> str:
    """What the customer says, who does not see the record: was there an answer, and how was it given?"""
    parts = gold.judge(case.prompt, response)
    words = ["Good to know." if gold.values_in(response, case.asked) else "That is no answer."]
    if parts["courtesy"] >= 1:
        words.append("You are kind.")
    if parts["rudeness"] < 0:
        words.append("How rude.")
    if parts["form"] < 0:
        words.append("Pardon?")
    return " " + " ".join(rng.sample(words, len(words)))


def be_courteous(rng: random.Random, sentences: list[str]) -> list[str]:
    """Add one to four of the five courtesies, each in its place around the answer."""
    kinds = set(rng.sample(["greeting", "thanks", "apology", "offer", "wish"], rng.choice((1, 1, 2, 2, 3, 4))))
    before = [rng.choice(GREETINGS)] if "greeting" in kinds else []
    before += [rng.choice(wordings) for kind, wordings in OPENERS.items() if kind in kinds]
    after = [rng.choice(wordings) for kind, wordings in CLOSERS.items() if kind in kinds]
    return before + sentences + after


def spoil(rng: random.Random, text: str, case: Case) -> str:
    """Spoil an answer in one way: cut it off, repeat a part, contradict it, drop it, or talk about something else."""
    mess = rng.choice(("cut", "twice", "contradict", "drop", "astray"))
    words, sentences = text.split(" "), text.replace("!", "!|").replace(".", ".|").replace("?", "?|").split("|")[:-1]
    if mess == "cut":
        return " ".join(words[: rng.randrange(len(words))]).rstrip(".!?") or words[0].rstrip(".!?")
    if mess == "twice":
        place = rng.randrange(len(sentences))
        return " ".join(s.strip() for s in sentences[: place + 1] + sentences[place:])
    if mess == "drop":
        return rng.choice(OPENERS["thanks"] + CLOSERS["offer"])
    asked = case.asked if mess == "contradict" else rng.choice([kind for kind in ANSWERS if kind != case.asked])
    return f"{text} {answer(rng, case, asked, rng.choice(gold.VALUES[asked]))}"


def other_value(rng: random.Random, kind: str, value: str) -> str:
    """A value of the same kind, but another one."""
    return rng.choice([other for other in gold.VALUES[kind] if other != value])


def compare(rng: random.Random, case: Case, habit: Habit, sharpness: float) -> tuple[dict[str, str], float]:
    """Two answers to one prompt, and a judge who prefers by Bradley-Terry on the gold score.

    Returns the comparison, and the probability that the better answer is labelled as chosen.
    """
    first = second = draw_response(rng, case, habit)
    while second == first:
        second = draw_response(rng, case, habit)
    gap = gold.score([case.prompt], [first])[0] - gold.score([case.prompt], [second])[0]
    first_wins = 1 / (1 + math.exp(-sharpness * gap))
    chosen, rejected = (first, second) if rng.random() < first_wins else (second, first)
    return {"prompt": case.prompt, "chosen": chosen, "rejected": rejected}, max(first_wins, 1 - first_wins)
