"""The gold reward of the tiny world: what a good answer is, in closed form, from the text alone.

The reward model never sees this function. It sees comparisons whose labels were drawn from it, with noise; so the
gold score of a policy shows whether PPO made the answers better, or only raised the reward model's score.

    fact       +1     the answer states what the record says, and nothing else of that kind; otherwise -1
    courtesy   +0.5   for each different kind of courtesy (greeting, thanks, apology, offer, wish), three at most;
                      a greeting counts only at the start and with no other name than the customer's
    rudeness   -0.5   for each rude remark, two at most
    form       -0.5   for each of: no full stop at the end, a sentence twice, a sentence that is none of the above,
                      more than 32 words; a line break or an empty answer costs all four, -2

A score lies between -4 (`WORST`) and 2.5 (`BEST`).
"""

from __future__ import annotations

import re

WORST, BEST = -4.0, 2.5
MOST_KINDS, MOST_REMARKS, MOST_WORDS = 3, 2, 32

# What can be asked about, and every value it can have. Prices are above and aisles below 10, so that a number alone
# shows which of the two it is.
VALUES = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "colour": ("red", "blue", "green", "white", "black", "yellow", "brown", "grey"),
    "price": tuple(str(euros) for euros in range(12, 60, 3)),
    "aisle": tuple(str(aisle) for aisle in range(1, 10)),
}
PROMPT = re.compile(r"(?P<name>\w+) asks: (?P<question>[^\n]*)\nRecord: (?P<record>[^\n]*)\nAgent:\s*")
# The words in a question that show what it asks for, and where the record has it.
ASKED = {
    "day": re.compile(r"\b(?:arrive|come|delivered)\b"),
    "price": re.compile(r"\b(?:cost|price|pay)\b"),
    "aisle": re.compile(r"\b(?:[Ww]here|aisle)\b"),
    "colour": re.compile(r"\bcolour\b"),
}
RECORDED = {
    "day": re.compile(r"\barrives (\w+)"),
    "price": re.compile(r"\bprice (\w+)"),
    "aisle": re.compile(r"\baisle (\w+)"),
    "colour": re.compile(r"\bcolour (\w+)"),
}

# Whole sentences without their closing mark; small variations are allowed inside, nothing around.
SENTENCE = re.compile(r"([^.!?]+)(?:[.!?]|$)")
THING = r"(?:[Ii]t|(?:[Tt]he|[Yy]our) \w+)"
ANSWER = {
    "day": rf"(?:(?:{THING} (?:arrives|comes|will arrive|will come|is delivered)|You can expect it) )?[Oo]n @|@",
    "price": rf"(?:(?:{THING} costs|The price is|You pay) )?@ euros",
    "aisle": rf"(?:{THING} is i|You find it i|Please look i|I|i)n aisle @|Aisle @",
    "colour": rf"(?:{THING} is|The colour is) @|You ordered the @ one|[TA] ?h?e? ?@ one",
}
GREETING = re.compile(r"(?:Hello|Hi|Dear|Good morning|Good day|Welcome)(?:,? (?P<name>[A-Z]\w*))?")
KINDS = {
    "thanks": re.compile(r"(?:Many thanks|Thanks|Thank you)(?: for(?: \w+){1,5})?"),
    "apology": re.compile(r"(?:I am sorry|We are sorry|Sorry|I apologise|We apologise) for(?: \w+){1,4}"),
    "offer": re.compile(r"(?:Can I|May I|Is there anything|Please ask|I am happy to|We are happy to)(?: \w+){1,7}"),
    "wish": re.compile(r"Have a(?: \w+){1,3}|Enjoy your \w+|All the best"),
    "rude": re.compile(
        r"You could have looked|Read the record|That is obvious|I said it before|Look it up next time"
        r"|What a question|I have no time for this"
    ),
}
COURTESIES = frozenset({"greeting", "thanks", "apology", "offer", "wish"})


def score(prompts: list[str], responses: list[str], **columns: list[object]) -> list[float]:
    """Gold score of every response, each between `WORST` and `BEST`; other columns of the rows are ignored."""
    return [sum(judge(prompt, response).values()) for prompt, response in zip(prompts, responses, strict=True)]


def judge(prompt: str, response: str) -> dict[str, float]:
    """The four parts of one gold score: fact, courtesy, rudeness and form; prompt and response may be any text."""
    facts = read_prompt(prompt)
    text = response.strip()
    sentences = [part.strip() for part in SENTENCE.findall(text) if part.strip()]
    kinds = [kind_of(sentence, i == 0, facts) for i, sentence in enumerate(sentences)]
    return {
        "fact": 1.0 if facts and values_in(text, facts["asked"]) == {facts["value"]} else -1.0,
        "courtesy": 0.5 * min(MOST_KINDS, len(COURTESIES & set(kinds))),
        "rudeness": -0.5 * min(MOST_REMARKS, kinds.count("rude")),
        "form": -0.5 * broken_rules(text, sentences, kinds),
    }


def read_prompt(prompt: str) -> dict[str, str]:
    """What a prompt says: the customer's `name`, what is `asked`, and the record's `value` for it.

    Empty for a text that is not a prompt of this world; then no answer is right.
    """
    found = PROMPT.fullmatch(prompt)
    asked = found and next((kind for kind, words in ASKED.items() if words.search(found["question"])), None)
    value = asked and RECORDED[asked].search(found["record"])
    return {"name": found["name"], "asked": asked, "value": value[1]} if value else {}


def values_in(text: str, kind: str) -> set[str]:
    """The values of one kind that a text names."""
    return set(re.findall(r"\w+", text)) & set(VALUES[kind])


def kind_of(sentence: str, first: bool, facts: dict[str, str]) -> str:
    """What a sentence is: answer, greeting, thanks, apology, offer, wish, rude or stray."""
    greeting = GREETING.fullmatch(sentence)
    if greeting:
        return "greeting" if first and greeting["name"] in (None, facts.get("name")) else "stray"
    if facts and any(is_answer(sentence, facts["asked"], value) for value in values_in(sentence, facts["asked"])):
        return "answer"
    return next((kind for kind, words in KINDS.items() if words.fullmatch(sentence)), "stray")


def is_answer(sentence: str, kind: str, value: str) -> bool:
    """True for a sentence of the usual wording that names `value`, right or wrong."""
    return re.fullmatch(ANSWER[kind].replace("@", value), sentence) is not None


def broken_rules(text: str, sentences: list[str], kinds: list[str]) -> int:
    """How many of the four rules of form a response breaks."""
    if not sentences or "\n" in text:
        return 4
    repeated = len({sentence.lower() for sentence in sentences}) < len(sentences)
    return (text[-1] not in ".!?") + repeated + ("stray" in kinds) + (len(text.split()) > MOST_WORDS)
