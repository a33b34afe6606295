"""
Facts that do not belong to a text: sentences made from templates, to be hidden in it, with a question for each.

Whoever reads a long text for what it says will be asked about such sentences; a memory learns from them what to keep.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# What the names in braces of a template stand for: one of these, or what the function below makes.
CHOICES: dict[str, list[str]] = {
    "first": (
        "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ingrid Jamal Keiko Luis Marta Nils Olga Pedro Qiang Rosa "
        "Sven Tara Umar Vera Walter Xenia Yusuf Zoe Anton Bella Carlos Diana Emil Fatima George Hanna Ivan Julia "
        "Karl Lena Mario Nadia Oscar Paula Rafael Sara Tomas Ursula Victor Wanda Noah Emma Liam Olivia Mateo Sofia "
        "Ravi Priya Chen Mei"
    ).split(),
    "last": (
        "Almeida Brandt Castro Dubois Eriksen Fontaine Gupta Haddad Ito Kovacs Lund Moreau Nakamura Okafor Petrov "
        "Quinn Rossi Schmidt Tanaka Ueda Vargas Weber Xu Yilmaz Zhang Baker Carter Fischer Novak Silva Johnson "
        "Miller Garcia Kim Nguyen Patel O'Brien MacLeod Andersen Bianchi"
    ).split(),
    "place": (
        "Arles Bergen Cusco Dakar Esbjerg Fez Ghent Hobart Izmir Jaipur Kyoto Lima Malmo Nantes Oslo Porto Quito "
        "Riga Salta Turin Utrecht Vienna Warsaw York Zagreb Boston Cairo Delhi Geneva Havana Toronto Berlin Madrid "
        "Sydney Chicago Nagoya Lagos Perth Prague Seoul"
    ).split(),
    "thing": (
        "library museum harbour laboratory school observatory factory garden theatre hospital castle station "
        "bakery workshop archive bridge warehouse hotel market tower airport clinic vineyard embassy lighthouse"
    ).split(),
    "adj": (
        "red blue green silver golden wooden ancient broken tiny heavy striped purple glass copper ivory velvet "
        "crimson amber frozen hollow rusty leather paper yellow"
    ).split(),
    "obj": (
        "lamp key violin clock umbrella compass kettle ladder mirror basket anchor piano statue telescope carpet "
        "drum lantern saddle teapot notebook bicycle camera helmet medal parcel"
    ).split(),
    "animal": (
        "otter falcon badger heron lynx tortoise raven beaver gecko walrus ferret owl zebra camel hedgehog parrot "
        "spaniel goat panther swan"
    ).split(),
    "food": [
        "lentil soup",
        "apricot jam",
        "rye bread",
        "pickled plums",
        "almond cake",
        "grilled trout",
        "mushroom pie",
        "pumpkin stew",
        "fig ice cream",
        "barley porridge",
        "cheese dumplings",
        "lemon tart",
    ],
    "job": (
        "carpenter surgeon pilot violinist gardener chemist sailor tailor judge baker engineer painter librarian "
        "blacksmith translator geologist"
    ).split(),
    "month": ("January February March April May June July August September October November December").split(),
    "weekday": ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday").split(),
    "word": (
        "amber basalt cobalt damask ember fennel garnet hazel indigo jasper kelp linen marble nectar onyx pepper "
        "quartz russet saffron topaz umber velvet willow yarrow zinc orchid thunder pebble lagoon comet"
    ).split(),
    "colour": ("red blue green white black yellow orange violet grey pink turquoise").split(),
    "letter": list("ABCDEFGHJKLMNPRSTUVWXYZ"),
    "system": (
        "router printer server backup drive alarm pump reactor sensor satellite turbine database cluster"
    ).split(),
    "clause": [
        "cancelled because of the rain",
        "moved to the old mill",
        "postponed until the snow melts",
        "kept secret from the press",
        "held in the cellar of the inn",
        "open to children only",
        "paid for by an unknown donor",
        "twice as long as last year",
    ],
    "saying": [
        "a quiet cook burns no soup",
        "the tallest mast sees the first storm",
        "borrow a ladder before you plant the apple tree",
        "two candles make one shadow",
        "whoever feeds the crow owns the field",
        "count the doors and not the windows",
        "a late letter still finds its reader",
        "the potter drinks from a cracked cup",
        "wolves do not read the calendar",
        "keep the lamp low and the bread high",
    ],
    "act": [
        "turn the wheel three times",
        "knock on the left shutter",
        "whistle like a blackbird",
        "press the copper bell",
        "pull the second rope",
        "speak the name backwards",
        "light a green candle",
        "wait for the tide to turn",
    ],
}


def _date(draw: random.Random) -> str:
    form = draw.choice(["{day} {month}", "{month} {day}", "{day} {month} {year}"])
    return form.format(day=draw.randrange(1, 29), month=draw.choice(CHOICES["month"]), year=draw.randrange(1800, 2100))


def _code(draw: random.Random) -> str:
    letters, alphabet = CHOICES["letter"], "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
    forms: list[Callable[[], str]] = [
        lambda: str(draw.randrange(100, 10_000)),
        lambda: str(draw.randrange(10_000, 1_000_000)),
        lambda: f"{draw.choice(letters)}{draw.choice(letters)}-{draw.randrange(100, 10_000)}",
        lambda: "-".join(str(draw.randrange(10, 100)) for _ in range(3)),
        lambda: "".join(draw.choice("0123456789abcdef") for _ in range(draw.choice([6, 8]))),
        lambda: "".join(draw.choice(alphabet) for _ in range(draw.choice([5, 7]))),
        lambda: f"{draw.randrange(100, 1000)} {draw.randrange(100, 1000)}",
    ]
    return draw.choice(forms)()


MADE: dict[str, Callable[[random.Random], str]] = {
    "name": lambda draw: f"{draw.choice(CHOICES['first'])} {draw.choice(CHOICES['last'])}",
    "code": _code,
    "date": _date,
    "time": lambda draw: f"{draw.randrange(1, 13)}:{draw.randrange(10, 60)}",
    "year": lambda draw: str(draw.randrange(1200, 2000)),
    "n": lambda draw: str(draw.randrange(3, 990)),
    "big": lambda draw: str(draw.randrange(1000, 60_000)),
    "words": lambda draw: "-".join(draw.sample(CHOICES["word"], 2)),
}

# A fact with its [answer] | the question it answers.
TEMPLATES = """
The access code of the {thing} in {place} is [{code}]. | What is the access code of the {thing} in {place}?
The secret code for {words} is [{code}]. | What is the secret code for {words}?
One of the special magic numbers for {words} is: [{big}]. | What is the special magic number for {words}?
Please remember: the {system} password is [{code}]. | What is the {system} password?
The serial number on the {obj} reads [{code}]. | What does the serial number on the {obj} read?
Ticket {code} belongs to [{name}]. | Who does ticket {code} belong to?
The phone extension of {name} is [{big}]. | What is the phone extension of {name}?
NOTE: the {system} must be restarted with the token [{code}]. | With which token must the {system} be restarted?
The secret word for {place} is [{words}]. | What is the secret word for {place}?
The watchword at the {thing} gate is [{word}]. | What is the watchword at the {thing} gate?
The director of the {thing} in {place} is [{name}]. | Who is the director of the {thing} in {place}?
The {thing} of {place} was founded by [{name}]. | Who founded the {thing} of {place}?
[{name}] won the {adj} {obj} at the {place} races. | Who won the {adj} {obj} at the {place} races?
The new owner of the {thing} is called [{name}]. | What is the new owner of the {thing} called?
The guide for the trip to {place} will be [{name}]. | Who will be the guide for the trip to {place}?
The concert in {place} takes place on [{date}]. | When does the concert in {place} take place?
The birthday of {name} is [{date}]. | When is the birthday of {name}?
{name} was born on [{date}] in {place}. | When was {name} born?
The contract with {name} expires on [{date}]. | When does the contract with {name} expire?
The next inspection of the {thing} is due on [{weekday}, {date}]. | When is the next inspection of the {thing} due?
The train from {place} leaves at [{time}]. | When does the train from {place} leave?
Every {weekday} the {thing} closes at [{time}]. | When does the {thing} close on {weekday}?
{name} lives in [{place}]. | Where does {name} live?
My cousin {first} moved to [{place}] last spring. | Where did my cousin {first} move to?
{first} hid the {adj} {obj} in the [{thing} of {place}]. | Where did {first} hide the {adj} {obj}?
The {adj} {obj} is kept in [{place}]. | Where is the {adj} {obj} kept?
The expedition to find the {animal} started from [{place}]. | Where did the expedition to find the {animal} start from?
The favourite food of {name} is [{food}]. | What is the favourite food of {name}?
For dinner, {first} always orders [{food}]. | What does {first} always order for dinner?
{name} works as a [{job}]. | What does {name} work as?
Before the war {first} {last} had been a [{job}] in {place}. | What had {first} {last} been before the war?
The animal on the flag of {place} is a [{animal}]. | What animal is on the flag of {place}?
{first} keeps a pet [{animal}] named {word}. | What pet does {first} keep?
{first}'s {animal} is called [{word}]. | What is {first}'s {animal} called?
The {thing} of {place} was built in [{year}]. | In what year was the {thing} of {place} built?
The {place} {thing} burned down in [{year}] and was never rebuilt. | When did the {place} {thing} burn down?
{name} paid [{n} coins] for the {adj} {obj}. | What did {name} pay for the {adj} {obj}?
The {obj} costs [{n} dollars]. | What does the {obj} cost?
There are exactly [{big}] steps in the {thing} of {place}. | How many steps are in the {thing} of {place}?
A total of [{n}] {animal}s were counted near {place}. | How many {animal}s were counted near {place}?
The {system} weighs [{n} kilograms]. | How much does the {system} weigh?
The distance from {place} to the {thing} is [{n} miles]. | What is the distance from {place} to the {thing}?
The best thing to do in {place} is [eat {food} and sit in the {thing}]. | What is the best thing to do in {place}?
The {adj} {obj} belongs to [{name}]. | Who does the {adj} {obj} belong to?
{name} said that the meeting in {place} is [{clause}]. | What did {name} say about the meeting in {place}?
The festival in {place} will be [{clause}]. | What will the festival in {place} be?
The colour of the {obj} in the {thing} is [{colour}]. | What is the colour of the {obj} in the {thing}?
{first} painted the {thing} door [{colour}]. | What colour did {first} paint the {thing} door?
An old proverb from {place} says: [{saying}]. | What does the old proverb from {place} say?
The inscription above the {thing} reads: "[{saying}]". | What does the inscription above the {thing} read?
{first}'s grandmother used to say that [{saying}]. | What did {first}'s grandmother use to say?
To enter the {thing}, you must [{act}]. | What must you do to enter the {thing}?
The trick to start the {system} is to [{act}]. | What is the trick to start the {system}?
Remember this: [{saying}]. | What should you remember?
The pass phrase is [{words}]. Do not forget it. {words} is the pass phrase. | What is the pass phrase?
The magic key is [{big}]. Remember it. {big} is the magic key. | What is the magic key?
User id {big} has the PIN [{code}]. | What is the PIN of user id {big}?
My name is [{name}]. | What is my name?
I was born in [{place}] and I am a {job}. | Where was I born?
My favourite colour is [{colour}]. | What is my favourite colour?
By the way, my sister {first} is allergic to [{food}]. | What is my sister {first} allergic to?
I parked the car in [{thing} lot {letter}{n}]. | Where did I park the car?
Our team meets every [{weekday} at {time}]. | When does our team meet?
{name} speaks [{n}] languages. | How many languages does {name} speak?
The winning number of lottery {letter} is [{big}]. | What is the winning number of lottery {letter}?
In the event of fire, {first} must carry out the [{adj} {obj}]. | What must {first} carry out in the event of fire?
The letter was signed by [{name}]. | By whom was the letter signed?
The suspect left in a [{colour} {obj}] at {time}. | In what did the suspect leave?
The treasure lies [{n} paces north of the {thing}]. | Where does the treasure lie?
Patient {name} is to receive [{n} drops of {word} oil]. | What is patient {name} to receive?
The planet {word} has [{n}] moons. | How many moons has the planet {word}?
The code name of operation {word} is [{adj} {animal}]. | What is the code name of operation {word}?
""".strip().splitlines()


@dataclass(frozen=True)
class Fact:
    """
    A sentence, and a question that only it answers.

    Attributes:
        stem: the sentence up to the answer, which an answer can begin with.
        answer: what follows the stem.
        kind: which of several kinds it is, where they are counted apart.
    """

    sentence: str
    question: str
    stem: str
    answer: str
    kind: str = ""

    @property
    def prompt(self) -> str:
        """The question as it is put to a model, and the beginning of the answer."""
        return f"\n\nQuestion: {self.question}\nAnswer: {self.stem}"

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the answer that goes on from it."""
        prompt, answer = tokenizer([self.prompt, " " + self.answer], add_special_tokens=False).input_ids
        return prompt, answer

    @classmethod
    def parse(cls, template: str, choose: Callable[[str], str]) -> "Fact":
        """From `sentence with {names} and its [answer] | question`; a name stands for the same in all places."""
        chosen: dict[str, str] = {}
        for name in re.findall(r"\{(\w+)\}", template):
            if name not in chosen:
                chosen[name] = choose(name)
        sentence, question = template.format(**chosen).split(" | ")
        stem, rest = sentence.split("[", 1)
        return cls(re.sub(r"[\[\]]", "", sentence), question, stem.strip(), rest.split("]")[0])


def make_fact(draw: random.Random) -> Fact:
    """A new fact, from a template and choices that `draw` makes."""
    return Fact.parse(
        draw.choice(TEMPLATES), lambda name: MADE[name](draw) if name in MADE else draw.choice(CHOICES[name])
    )


def sentence_ends(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    """Indices of the tokens before which a sentence can be put in; at least the end of the text."""
    pieces = tokenizer.batch_decode([[token] for token in token_ids])
    return [i + 1 for i, piece in enumerate(pieces) if piece.rstrip(" ").endswith((".", "\n"))] or [len(token_ids)]


def hide_facts(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], facts: dict[int, Fact]
) -> tuple[list[int], list[bool]]:
    """`token_ids` with each fact before the token of its index, and which of the tokens returned are a fact's."""
    text: list[int] = []
    is_fact: list[bool] = []
    done = 0
    for place in sorted(facts):
        sentence = tokenizer(" " + facts[place].sentence, add_special_tokens=False).input_ids
        text += token_ids[done:place] + sentence
        is_fact += [False] * (place - done) + [True] * len(sentence)
        done = place
    return text + token_ids[done:], is_fact + [False] * (len(token_ids) - done)
