"""Who is where: a simulator of actors, places and objects in the manner of bAbI (Weston et al., 2015), hidden in noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .task import FIRST_SYMBOL, Task, chosen_labels, require, scatter

ACTORS = ("mary", "john", "daniel", "sandra", "fred", "julie", "bill", "jeff")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom", "park", "school")
OBJECTS = ("football", "apple", "milk", "book", "lamp", "key", "coat", "bottle")
WORDS = (*ACTORS, *PLACES, *OBJECTS, "went", "took", "dropped", "where", "before", ".", "?")
IDS = {word: FIRST_SYMBOL + i for i, word in enumerate(WORDS)}
FIRST_NOISE = FIRST_SYMBOL + len(WORDS)


@dataclass
class World:
    """Where everybody is, what they hold, and where each object has been, in order."""

    actor_place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    object_places: dict[str, list[str]] = field(default_factory=dict)

    def tell(self, actor: str, verb: str, what: str) -> None:
        """Take in one sentence."""
        if verb == "went":
            self.actor_place[actor] = what
            for thing, holder in self.holder.items():
                if holder == actor:
                    self._note(thing, what)
        elif verb == "took":
            self.holder[what] = actor
            self._note(what, self.actor_place[actor])
        else:
            del self.holder[what]

    def _note(self, thing: str, place: str) -> None:
        places = self.object_places.setdefault(thing, [])
        if not places or places[-1] != place:
            places.append(place)

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

    def possible_events(self) -> list[tuple[str, str, str]]:
        events = [
            (actor, "went", place) for actor in ACTORS for place in PLACES if self.actor_place.get(actor) != place
        ]
        return events + self.possible_handlings()

    def possible_handlings(self) -> list[tuple[str, str, str]]:
        """An object can be taken where it is, or anywhere while nobody has seen it."""
        handlings = [(holder, "dropped", thing) for thing, holder in self.holder.items()]
        for thing in OBJECTS:
            places = self.object_places.get(thing)
            if thing in self.holder:
                continue
            handlings += [
                (actor, "took", thing)
                for actor, place in self.actor_place.items()
                if not places or places[-1] == place
            ]
        return handlings


@dataclass(frozen=True, kw_only=True)
class Story(Task):
    """
    Who is where, in stories of bAbI's kinds 1 to 3, hidden in noise: where an actor is; where an object is, which actors carry
    about; where an object was before it came to some place (the last time, if it came there twice).

    Args:
        hops: kind of the story, which is also the number of sentences that an answer rests on, at least.
        num_facts: sentences.
        num_queries: different questions at the end, each with its answer behind it.
        vocab_size: words, and then noise.

    >>> print(Story(length=20, hops=1, num_facts=3).example())
    bill went park . n37 n4 n9 julie went kitchen . n1 sandra went school . where bill ? park => park
    """

    name: ClassVar[str] = "story"

    vocab_size: int = 160
    hops: int = 1
    num_facts: int | None = None
    num_queries: int = 1

    def __post_init__(self):
        require(
            self.vocab_size > FIRST_NOISE + 1,
            "vocab_size",
            self.vocab_size,
            f"be more than {FIRST_NOISE + 1}, words and noise",
        )
        require(self.hops in (1, 2, 3), "hops", self.hops, "be 1, 2 or 3")
        self.require_length(
            4 * self.hops + self.num_queries * self._question_length,
            f"{self.hops} sentences and {self.num_queries} questions",
        )
        room, count = (self.length - self.num_queries * self._question_length) // 4, self._num_facts
        require(
            self.hops <= count <= room,
            "num_facts",
            count,
            f"be from {self.hops} to {room}, four tokens each; or use longer rows",
        )
        # So few that a story told at random most often has as many questions.
        most = max(1, min(count // (2 * self.hops), len(ACTORS) // 2))
        require(
            1 <= self.num_queries <= most,
            "num_queries",
            self.num_queries,
            f"be from 1 to {most} after {count} sentences; or raise num_facts",
        )

    @property
    def _num_facts(self) -> int:
        return (2, 6, 10)[self.hops - 1] if self.num_facts is None else self.num_facts

    @property
    def _question_length(self) -> int:
        return 6 if self.hops == 3 else 4

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        sentences, asked = self._tell(random)
        items = [[IDS[word] for word in (*sentence, ".")] for sentence in sentences]
        end = [IDS[word] for question, answer in asked for word in (*question, answer)]
        noise = random.integers(FIRST_NOISE, self.vocab_size, self.length - 4 * len(items) - len(end)).tolist()
        input_ids = scatter(random, items, noise) + end
        first = self.length - len(end) + self._question_length - 1
        return input_ids, chosen_labels(input_ids, range(first, self.length, self._question_length))

    def _tell(self, random: np.random.Generator) -> tuple[list[tuple[str, str, str]], list[tuple[list[str], str]]]:
        while True:
            world, sentences = World(), []
            for _ in range(self._num_facts):
                events = world.possible_events()
                handlings = world.possible_handlings() if self.hops > 1 else []
                if self.hops == 1:
                    events = [event for event in events if event[1] == "went"]
                elif handlings and random.random() < 0.5:
                    events = handlings
                elif world.holder and random.random() < 0.5:
                    carrying = set(world.holder.values())
                    events = [event for event in events if event[0] in carrying]
                sentences.append(events[random.integers(len(events))])
                world.tell(*sentences[-1])
            # A story with too few answers is told anew.
            questions = world.questions(self.hops)
            if len(questions) >= self.num_queries:
                chosen = random.choice(len(questions), self.num_queries, replace=False)
                return sentences, [questions[i] for i in chosen]

    def oracle(self, prefix: Sequence[int]) -> int:
        words = [self._word(token) for token in prefix if FIRST_SYMBOL <= token < FIRST_NOISE]
        told = words[: words.index("where")]
        world = World()
        for sentence in _sentences(told):
            world.tell(*sentence)
        question = words[len(words) - self._question_length + 1 :]
        return IDS[{tuple(asked): answer for asked, answer in world.questions(self.hops)}[tuple(question)]]

    def render(self, input_ids: Sequence[int]) -> str:
        return " ".join(self._word(token) for token in input_ids)

    @staticmethod
    def _word(token: int) -> str:
        return WORDS[token - FIRST_SYMBOL] if token < FIRST_NOISE else f"n{token - FIRST_NOISE}"


def _sentences(words: list[str]) -> list[tuple[str, str, str]]:
    return [(words[i], words[i + 1], words[i + 2]) for i in range(0, len(words), 4)]
