"""Who is where: a simulator of actors, places and objects in the manner of bAbI (Weston et al., 2015), hidden in noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np

from ..token_loss import IGNORED
from .task import FIRST_SYMBOL, Task, chosen_labels, require, scatter

ACTORS = ("mary", "john", "daniel", "sandra", "fred", "julie", "bill", "jeff")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom", "park", "school")
OBJECTS = ("football", "apple", "milk", "book", "lamp", "key", "coat", "bottle")
WORDS = (*ACTORS, *PLACES, *OBJECTS, "went", "took", "dropped", "where", "before", ".", "?")
IDS = {word: FIRST_SYMBOL + i for i, word in enumerate(WORDS)}
FIRST_NOISE = FIRST_SYMBOL + len(WORDS)
# Stories told for a row, in search of one that has enough questions.
MOST_TRIES = 1000


@dataclass
class World:
    """
    Where everybody is, what they hold, and where each object has been, in order.

    Args:
        handlers: of an object, who took or dropped it last; of an object and a place, who brought it there, the last time.
    """

    actor_place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    object_places: dict[str, list[str]] = field(default_factory=dict)
    handlers: dict[tuple[str, ...], str] = field(default_factory=dict)

    def tell(self, actor: str, verb: str, what: str) -> None:
        """Take in one sentence."""
        if verb == "went":
            self.actor_place[actor] = what
            for thing in self.held_by(actor):
                self._note(thing, what, actor)
            return
        self.handlers[what,] = actor
        if verb == "took":
            self.holder[what] = actor
            self._note(what, self.actor_place[actor], actor)
        else:
            del self.holder[what]

    def held_by(self, actor: str) -> list[str]:
        return [thing for thing, holder in self.holder.items() if holder == actor]

    def _note(self, thing: str, place: str, actor: str) -> None:
        places = self.object_places.setdefault(thing, [])
        if not places or places[-1] != place:
            places.append(place)
            self.handlers[thing, place] = actor

    def questions(self, hops: int) -> list[tuple[list[str], str]]:
        """All questions of a kind that have an answer now, as words, with it."""
        if hops == 1:
            return [(["where", actor, "?"], place) for actor, place in self.actor_place.items()]
        if hops == 2:
            return [(["where", thing, "?"], places[-1]) for thing, places in self.object_places.items()]
        return [
            (["where", thing, "before", place, "?"], places[last - 1])
            for thing, places in self.object_places.items()
            for last, place in ((len(places) - 1 - places[::-1].index(place), place) for place in sorted(set(places)))
            if last > 0
        ]

    def possible_goings(self) -> list[tuple[str, str, str]]:
        return [(actor, "went", place) for actor in ACTORS for place in PLACES if self.actor_place.get(actor) != place]

    def possible_takings(self) -> list[tuple[str, str, str]]:
        """An object can be taken where it is, or anywhere while nobody has seen it."""
        free = [thing for thing in OBJECTS if thing not in self.holder]
        return [
            (actor, "took", thing)
            for thing in free
            for actor, place in self.actor_place.items()
            if thing not in self.object_places or self.object_places[thing][-1] == place
        ]

    def possible_handlings(self) -> list[tuple[str, str, str]]:
        return [(holder, "dropped", thing) for thing, holder in self.holder.items()] + self.possible_takings()


@dataclass(frozen=True, kw_only=True)
class Story(Task):
    """
    Who is where, in stories of bAbI's kinds 1 to 3, hidden in noise: where an actor is; where an object is, which actors carry
    about; where an object was before it came to some place (the last time, if it came there twice).

    Args:
        hops: kind of the story, which is also the number of sentences that an answer rests on, at least.
        num_facts: sentences.
        num_queries: different questions at the end, each with its answer behind it.
        num_easier: questions of the kind below beside those, in random order.
        num_arrivals, num_takings: the first sentences: so many actors go somewhere, then so many things are taken, which needs
            actors that have arrived, and a story of several hops.
        vocab_size: words, and then noise.

    >>> print(Story(length=20, hops=1, num_facts=3).example())
    bill went park . n37 n4 n9 julie went kitchen . n1 sandra went school . where bill ? park => park
    """

    name: ClassVar[str] = "story"

    vocab_size: int = 160
    hops: int = 1
    num_facts: int | None = None
    num_queries: int = 1
    num_easier: int = 0
    num_arrivals: int = 0
    num_takings: int = 0

    def __post_init__(self):
        require(
            self.vocab_size > FIRST_NOISE + 1,
            "vocab_size",
            self.vocab_size,
            f"be more than {FIRST_NOISE + 1}, words and noise",
        )
        require(self.hops in (1, 2, 3), "hops", self.hops, "be 1, 2 or 3")
        asked = f"{self.num_queries} questions and {self.num_easier} easier ones"
        self.require_length(4 * self.hops + self._ending, f"{self.hops} sentences, {asked}")
        room, count = (self.length - self._ending) // 4, self.num_sentences
        require(
            self.hops <= count <= room,
            "num_facts",
            count,
            f"be from {self.hops} to {room}, four tokens each; or use longer rows",
        )
        self._check_opening()
        for name, least, kind in (("num_queries", 1, self.hops), ("num_easier", 0, self.hops - 1)):
            most = self.most_questions(kind)
            require(
                least <= getattr(self, name) <= most,
                name,
                getattr(self, name),
                f"be from {least} to {most} after {count} sentences of kind {self.hops}; or raise num_facts",
            )

    def _check_opening(self) -> None:
        """After it there must be room for what is asked for."""
        most = min(len(ACTORS), self.num_sentences - self.hops + 1)
        rule = f"be from 0 to {most}, of {len(ACTORS)} actors and {self.num_sentences} sentences"
        require(0 <= self.num_arrivals <= most, "num_arrivals", self.num_arrivals, rule)
        if self.hops == 1 or self.num_arrivals == 0:
            rule = "be 0 with one hop, and where nobody has arrived; or raise hops, or num_arrivals"
            require(self.num_takings == 0, "num_takings", self.num_takings, rule)
        else:
            most = min(len(OBJECTS), self.num_sentences - self.num_arrivals - (self.hops - 2))
            rule = f"be from 0 to {most}, of {len(OBJECTS)} objects and the sentences left; or raise num_facts"
            require(0 <= self.num_takings <= most, "num_takings", self.num_takings, rule)

    @property
    def num_sentences(self) -> int:
        return (2, 6, 10)[self.hops - 1] if self.num_facts is None else self.num_facts

    def without_noise(self) -> Self:
        """The same in rows just as long as the sentences and questions are."""
        return replace(self, length=4 * self.num_sentences + self._ending)

    @property
    def _ending(self) -> int:
        """Tokens of all questions and their answers."""
        return self.num_queries * _question_length(self.hops) + self.num_easier * _question_length(self.hops - 1)

    def most_questions(self, kind: int) -> int:
        """So few of a kind that a story told at random most often has as many, or those that its opening makes certain."""
        if kind == 0:
            return 0
        count, opening = self.num_sentences, (self.num_arrivals, self.num_takings, 0)[: self.hops]
        usual = min((count // 2, 2 * count // 5, count // 6)[kind - 1], len(ACTORS) // 2)
        certain = opening[kind - 1]
        # What the opening leaves, less a sentence for each other kind that it has none of.
        others = [sentences for other, sentences in enumerate(opening, 1) if other != kind]
        left = count - sum(opening) - others.count(0)
        return min(certain + left, max(1, certain, usual))

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        sentences, asked = self._tell(random)
        items = [[IDS[word] for word in (*sentence, ".")] for sentence in sentences]
        end = [IDS[word] for question, answer in asked for word in (*question, answer)]
        noise = random.integers(FIRST_NOISE, self.vocab_size, self.length - 4 * len(items) - len(end)).tolist()
        input_ids = scatter(random, items, noise) + end
        asks = [position for position, token in enumerate(input_ids) if token == IDS["?"]]
        return input_ids, chosen_labels(input_ids, [position + 1 for position in asks])

    def lessons(self, input_ids: Sequence[int], random: np.random.Generator) -> list[int]:
        """
        Further labels of a row, for training, that say what its answers rest on; -100 where there is none, as at the answers.

        In the place of a sentence's "." one of the things that its actor holds now ("." if none), behind it his place if it is about a
        thing (with three hops, if he went, the place that he left), in the place of a question's "?" who took or dropped the thing
        last (with three hops, who brought it to that place).
        """
        labels, world = [IGNORED] * len(input_ids), World()
        for position, token in enumerate(input_ids):
            if token == IDS["."]:
                actor, verb, what = map(self._word, input_ids[position - 3 : position])
                left = world.actor_place.get(actor)
                world.tell(actor, verb, what)
                held = world.held_by(actor)
                labels[position] = IDS[held[random.integers(len(held))] if held else "."]
                if verb != "went":
                    labels[position + 1] = IDS[world.actor_place[actor]]
                elif self.hops == 3 and left:
                    labels[position + 1] = IDS[left]
            elif token == IDS["where"]:
                begin = position + 1
            elif token == IDS["?"]:
                about = tuple(map(self._word, input_ids[begin:position:2]))
                if about in world.handlers:
                    labels[position] = IDS[world.handlers[about]]
        return labels

    def _tell(self, random: np.random.Generator) -> tuple[list[tuple[str, str, str]], list[tuple[list[str], str]]]:
        counts = {
            kind: count for kind, count in ((self.hops, self.num_queries), (self.hops - 1, self.num_easier)) if count
        }
        for _ in range(MOST_TRIES):
            world, sentences = World(), []
            for number in range(self.num_sentences):
                events = self._possible_events(world, number, random)
                sentences.append(events[random.integers(len(events))])
                world.tell(*sentences[-1])
            # A story with too few answers is told anew.
            questions = {kind: world.questions(kind) for kind in counts}
            if all(len(questions[kind]) >= count for kind, count in counts.items()):
                asked = [
                    questions[kind][i]
                    for kind, count in counts.items()
                    for i in random.choice(len(questions[kind]), count, replace=False)
                ]
                if self.num_easier:
                    random.shuffle(asked)
                return sentences, asked
        raise ValueError(
            f"none of {MOST_TRIES:,} stories of {self.num_sentences} sentences has {self.num_queries} questions and {self.num_easier} "
            "easier ones; lower num_queries or num_easier, or raise num_facts"
        )

    def _possible_events(self, world: World, number: int, random: np.random.Generator) -> list[tuple[str, str, str]]:
        """What sentence `number` may say."""
        if number < self.num_arrivals:
            return [event for event in world.possible_goings() if event[0] not in world.actor_place]
        if number < self.num_arrivals + self.num_takings:
            return world.possible_takings()
        if self.hops == 1:
            return world.possible_goings()
        handlings = world.possible_handlings()
        if handlings and random.random() < 0.5:
            return handlings
        events = world.possible_goings() + handlings
        if world.holder and random.random() < 0.5:
            carrying = set(world.holder.values())
            events = [event for event in events if event[0] in carrying]
        return events

    def oracle(self, prefix: Sequence[int]) -> int:
        words = [self._word(token) for token in prefix if FIRST_SYMBOL <= token < FIRST_NOISE]
        told = words[: words.index("where")]
        world = World()
        for sentence in _sentences(told):
            world.tell(*sentence)
        question = words[len(words) - words[::-1].index("where") - 1 :]
        return IDS[
            {tuple(asked): answer for kind in (1, 2, 3) for asked, answer in world.questions(kind)}[tuple(question)]
        ]

    def render(self, input_ids: Sequence[int]) -> str:
        return " ".join(self._word(token) for token in input_ids)

    @staticmethod
    def _word(token: int) -> str:
        return WORDS[token - FIRST_SYMBOL] if token < FIRST_NOISE else f"n{token - FIRST_NOISE}"


def _question_length(kind: int) -> int:
    """Tokens of a question and its answer."""
    return 6 if kind == 3 else 4


def _sentences(words: list[str]) -> list[tuple[str, str, str]]:
    return [(words[i], words[i + 1], words[i + 2]) for i in range(0, len(words), 4)]
