"""Other facts about the subject of a request: frames by kind of subject, and which of them a request is asked.

The frames are for measuring alone. Nothing is trained on them, and none is a wording of a data set.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tpatch_jax.core.checks import text_generator
from tpatch_jax.editors.locating import subject_spans
from tpatch_jax.requests import EditRequest

__all__ = ["FRAMES", "KINDS", "Frame", "choose_frames", "kind_of_subject", "topics_of"]


class Frame(NamedTuple):
    """Another fact about a subject, as an unfinished statement and as a question, with ``{}`` for the subject.

    Attributes:
        statement: a text that ends where the answer begins.
        question: the same asked.
        topics: what it is about. A request about one of these is not asked it.

    Example:
        >>> FRAMES["place"][0].statement.format("Peru")
        'People in Peru pay with the'
    """

    statement: str
    question: str
    topics: tuple[str, ...]


def _frames(*frames: tuple[str, str, str]) -> tuple[Frame, ...]:
    return tuple(Frame(statement, question, tuple(topics.split())) for statement, question, topics in frames)


FRAMES: Mapping[str, tuple[Frame, ...]] = {
    "person": _frames(
        ("The childhood home of {} stood in", "Where did {} spend the years of childhood?", "origin place"),
        ("The birthday of {} falls on", "On which day is the birthday of {}?", "time origin"),
        ("The grave of {} lies in", "Where does the grave of {} lie?", "death place"),
        ("The wedding of {} was with", "Who stood beside {} at the wedding?", "family"),
        ("The parents of {} were", "Who were the parents of {}?", "family"),
        ("As a student {} went to the University of", "At which university was {} a student?", "school place"),
        ("The first job of {} was that of a", "What was the first job of {}?", "work art"),
        ("With friends {} talked in", "In which language did {} talk with friends?", "language"),
        ("The faith of {} was", "Which faith did {} have?", "religion"),
        ("People still remember {} for", "What do people still remember {} for?", "fame"),
        ("The best friend of {} was", "Who was the best friend of {}?", "friends"),
        ("For dinner {} liked to eat", "What did {} like to eat for dinner?", "food"),
        ("The hair of {} was", "Which colour did the hair of {} have?", "looks"),
        ("A hobby of {} was", "What was a hobby of {}?", "hobby"),
        ("The prize that {} received was the", "Which prize did {} receive?", "prize"),
        ("In politics {} sided with the", "With which party did {} side in politics?", "politics member"),
    ),
    "organisation": _frames(
        ("The people who set up {} were", "Who set up {}?", "maker"),
        (
            "The number of people on the payroll of {} is about",
            "How many people are on the payroll of {}?",
            "people work",
        ),
        ("At the top of {} stands", "Who stands at the top of {}?", "leader"),
        ("The sign of {} shows a", "What does the sign of {} show?", "logo"),
        ("In a good year {} earns about", "How much does {} earn in a good year?", "money"),
        ("The strongest rival of {} is", "Who is the strongest rival of {}?", "rival"),
        ("The words of the motto of {} are", "How does the motto of {} read?", "motto"),
        ("The history of {} goes back to the year", "To which year does the history of {} go back?", "time"),
        ("Everybody knows {} for its", "What does everybody know {} for?", "fame"),
        ("Anyone who wants to join {} has to", "What does one have to do to join {}?", "join member"),
        ("The short name of {} is", "What is the short name of {}?", "name"),
        ("A complaint that one hears about {} is that", "Which complaint does one hear about {}?", "complaints"),
        ("The flag at the door of {} has the colours", "Which colours does {} put on its flag?", "looks"),
        ("Staff at {} talk to each other in", "In which language do staff at {} talk?", "language"),
    ),
    "place": _frames(
        ("People in {} pay with the", "What money do people in {} pay with?", "money"),
        ("In winter the temperature in {} drops to", "How cold does {} get in winter?", "climate"),
        ("The number of people who live in {} is about", "How many people would a census count in {}?", "people"),
        ("The coat of arms of {} shows", "What does the flag of {} show?", "flag"),
        ("A sight that no visitor of {} should miss is the", "Which sight of {} should nobody miss?", "sights"),
        ("A dish that is often cooked in {} is", "Which dish is often cooked in {}?", "food"),
        ("Right next to {} lies", "What lies right next to {}?", "place twin"),
        ("The water that flows through {} is the", "Which water flows through {}?", "water"),
        ("The first settlers came to {} in the year", "In which year did the first settlers come to {}?", "time"),
        ("The sport that people in {} like most is", "Which sport do people in {} like most?", "sport"),
        ("At the head of {} stands", "Who stands at the head of {}?", "leader"),
        ("Most believers in {} are", "What are most believers in {}?", "religion"),
        ("Most families in {} make a living by", "What do most families in {} make a living by?", "economy work"),
        ("On the streets of {} one hears people talk in", "Which language do shopkeepers in {} use?", "language"),
        ("The schools of {} are known for", "What are the schools of {} known for?", "school"),
        ("The trees that grow around {} are mostly", "Which trees grow around {}?", "nature"),
    ),
    "work": _frames(
        ("The plot of {} starts with", "How does the plot of {} start?", "plot"),
        ("The hero of {} is called", "What is the hero of {} called?", "hero"),
        ("In reviews {} was said to be", "What was said of {} in reviews?", "critics"),
        ("From beginning to end {} takes about", "How long does {} take from beginning to end?", "length size time"),
        ("The first words of {} are", "What are the first words of {}?", "words"),
        ("Whoever likes {} will also like", "What will somebody like who likes {}?", "similar"),
        ("The public first got to know {} in the year", "In which year did the public get to know {}?", "time channel"),
        ("The melody that goes with {} is by", "Who is the melody that goes with {} by?", "art maker"),
        ("In the end of {} the", "What happens in the end of {}?", "ending"),
        ("The mood of {} is", "What is the mood of {}?", "mood genre"),
        ("The title {} means", "What does the title {} mean?", "name"),
        ("The money that {} brought in was about", "How much money did {} bring in?", "money"),
        ("The award that {} won was the", "Which award was handed to the makers of {}?", "prize"),
        ("The scenes of {} are set in", "Where are the scenes of {} set?", "place origin"),
    ),
    "thing": _frames(
        ("A child would paint {} in the colour", "Which colour does {} usually have?", "looks"),
        ("On the scales {} shows about", "What do scales show for {}?", "weight"),
        ("What people do with {} is to", "What do people do with {}?", "use"),
        ("Whoever wants {} has to pay about", "How much does one have to pay for {}?", "money"),
        ("The material of {} is mostly", "Which material does {} mostly consist of?", "material"),
        ("The most important part of {} is the", "Which part of {} is the most important?", "parts"),
        ("Something that resembles {} is", "What resembles {}?", "similar"),
        ("In the view of scholars {} is", "What do scholars think of {}?", "critics"),
        ("The beginnings of {} date from the year", "From which year do the beginnings of {} date?", "time"),
        ("The reason why many know {} is", "Why do many know {}?", "fame"),
        ("What often goes wrong with {} is the", "What often goes wrong with {}?", "problem"),
        ("The forerunner of {} was", "What was the forerunner of {}?", "forerunner"),
        ("From one end to the other {} measures about", "How much does {} measure from end to end?", "size"),
        ("The good thing about {} is that", "What is good about {}?", "advantage"),
    ),
}
"""The frames by kind of subject. They are not among those that values are trained on."""

KINDS = tuple(FRAMES)

# What a prompt is about, by how its words begin; a space at the end makes it the whole word.
_TOPICS: Mapping[str, str] = {
    "language": "languag|tongue |speak|spoke|talk|dialect|understand|writes in |written in |lyrics",
    "origin": "born |birth|native|origin|citizen|national|hometown|grew |childhood|comes from|came from|is from|ancest",
    "place": "locat|situat|lies |continent|country |found in|found on|where |city |town |region|state |province|"
    "capital|headquart|based |border|neighb|next to|lives |lived |resid|set in ",
    "twin": "twin|sister cit|partner cit",
    "death": "died |dies |death|dead |passed away|expired|killed|lost their life|lost his life|lost her life|buried|"
    "grave|succumb",
    "family": "wife |husband|spouse|married|marri|wedding|father|mother of|mother is|mother was|son |sons |daughter|"
    "child |children|parent|brother|sister of|sibling|uncle|aunt |grand|partner of",
    "school": "school|universit|college|studied|student|educat|graduat|alma mater|degree",
    "work": "profession|occupation|job |work|employ|career|position|domain of|field of|area of|specializ|specialis|"
    "expert|industry|role |title of|office of|plays as|economy",
    "art": "play|perform|instrument|sing |sings |singer|sang |music|compos|record|melod|song",
    "genre": "genre|style|kind of|sort of|type of|category",
    "religion": "relig|faith|church|worship|believ|pray|denominat|follows the",
    "politics": "politic|party |party's|elect|minister|senat|parliament",
    "member": "member|belongs to|affiliat|a part of|is part of|was part of|team |club |league |joined|joins|signed",
    "leader": "president|minister|mayor|governor|king |queen |head of|leader|leads |led by|ceo |chief|chair|director|"
    "ruler|rules |monarch|emperor|pope |in charge|boss|run by|runs |headed",
    "maker": "produc|creat|develop|manufactur|made |makes|maker|invent|design|built|build|formulat|author|wrote|"
    "written by|painted|directed|founder|founded|set up|started by|formed by|composed by",
    "owner": "own |owns |owned|owner|belongs to|subsidiar|parent company|property",
    "channel": "aired|airs |air |airing|debut|premier|broadcast|channel|network|released|shown on|appeared on|launch",
    "time": "year|date|when |founded|start|formed|establish|began|begin|since|released|century|age |old |birthday|"
    "created in|developed in|formulated in|built in|debut|premier",
    "name": "named|called|name |names |known as|nickname|alias|abbreviat|stands for",
    "money": "money|currenc|price|cost|earn|income|revenue|budget|pay |pays |worth|salary",
    "people": "population|inhabitants|people live|how many|number of people|number of employees|residents",
    "prize": "prize|award|medal|won |wins |honour|honor|received",
    "sport": "sport|plays for|played for|football|soccer|basketball|hockey|coach",
    "fame": "known for|famous|remembered|renowned",
    "similar": "similar|resembl|like ",
    "hero": "character|hero|protagonist|starring|stars |cast |actor|actress",
    "plot": "plot|story",
    "water": "river|lake|sea |ocean|water|flows",
    "climate": "climate|weather|temperature",
    "looks": "colour|color|hair |eyes |looks ",
    "food": "food|dish |eat |eats |cuisine|cook",
    "material": "made of|material|consist",
    "size": "size|long |length|tall |height|area is|measur|big |large",
    "weight": "weigh|heavy|mass ",
    "use": "used |use |purpose",
    "logo": "logo|sign |emblem|symbol",
    "motto": "motto|slogan",
    "flag": "flag",
}

# What kind of subject a prompt asks about, by how its words begin.
_ASKED_OF: Mapping[str, str] = {
    "person": "born |birth|tongue |citizen|national|native|profession|occupation|job |career|married|marri|wife |"
    "husband|spouse|father|mother|son |daughter|child|brother|died |dies |passed away|expired|lost their life|killed|"
    "who |whose position|works |worked |employ|play|perform|sings|relig|faith|pray|studied|graduat|educat|lives |lived "
    "|speaks|spoke |position|his |her |field of|area of work|domain of|writes |specializ|specialis|vocal|instrument",
    "place": "capital|continent|country|border|population|inhabitants|twin|sister cit|official language|president|"
    "prime minister|mayor|governor|currenc|located in|in the province|in the county|is in |region|flag |visitor|"
    "spoken in|spoken is|they understand|the law in|weather|people in|city of|highest|largest city|where is|"
    "location of|lies in",
    "organisation": "headquart|ceo |chief executive|founder|founded|company|employees|subsidiar|members|based in|"
    "affiliat|chairman|head of|formed in|merged|competes|stadium|rival|started in|boss",
    "work": "film|movie|novel|book|album|series|show |episode|aired|airs |to air|debut|premier|broadcast|original "
    "language|language of|author|written by|wrote|directed|director|starring|cast |genre|poem|painting|painted|opera|"
    "sequel|plot|character|soundtrack|singer of|released on|magazine|published|title of",
    "thing": "produc|manufactur|develop|creat|made by|maker|invent|discover|engine|designed|moons|planet|species|"
    "built by|version|operating system|owned by|owner|element|named after|model of",
}

# What kind of subject a name is of, by its words.
_NAMED: Mapping[str, str] = {
    "person": "sir |saint |st |pope |king |queen |prince |princess |emperor |lord |lady |dr |mr |mrs |jr |von |van |de "
    "|ibn |bin ",
    "place": "river|mountain|mount |lake|island|isle|county|city|town|village|province|district|republic|kingdom|"
    "region|airport|station|park |street|avenue|bay |valley|coast|glacier|peninsula|states|sea |ocean|bridge|castle|"
    "range|railway|plateau|heights|desert|cape |hills|forest|stadium|cathedral|tower|palace",
    "organisation": "universit|college|school|institut|museum|company|corporation|corp |inc |ltd |group|bank |club|"
    "association|party|agency|airlines|airways|church|orchestra|band |records|studios|foundation|society|committee|"
    "ministry|army|league|team|union|council|department|press |media|motors|industries|fc |cars |order |festival",
    "work": "film|song|album|series|show |episode|symphony no|sonata|magazine|times |story|saga|trilogy|tales|"
    "chronicles",
    "thing": "windows|engine|server|phone|android|protocol|aircraft|rifle|missile|class |mark |series |xbox|nintendo|"
    "playstation|galaxy |java |linux",
}

_SMALL = re.compile("of|the|and|d[aeiu]|del|de[nr]|l[ae]|v[ao]n|y|e|bin|ibn|al")
_PLAIN_WORD = re.compile(r"[^\W_]+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019.][^\W\d_]+)*\.?")


def _plain(text: str) -> str:
    """The words of a text, a space before and behind each."""
    return " ".join(["", *_PLAIN_WORD.findall(text.casefold()), ""])


def _begins(cues: str) -> re.Pattern[str]:
    return re.compile("|".join(f" {re.escape(cue)}" for cue in cues.split("|")))


_TOPIC_OF, _KIND_ASKED, _KIND_NAMED = (
    {name: _begins(cues) for name, cues in table.items()} for table in (_TOPICS, _ASKED_OF, _NAMED)
)


def _rest(request: EditRequest) -> str:
    """The prompt without its subject and without what puts a question."""
    spans = subject_spans(request.prompt, request.subject or "")
    kept, end = [], 0
    for start, stop in spans:
        kept.append(request.prompt[end:start])
        end = stop
    text = " ".join([*kept, request.prompt[end:]])
    return _plain(re.sub(r"^\s*(?:Question|Q)\s*:|\b(?:Answer|A)\s*:\s*$", " ", text))


def topics_of(request: EditRequest) -> frozenset[str]:
    """What a request asks of its subject, as far as its words tell.

    Args:
        request: with a subject.

    Returns:
        Names of topics; none where the words say nothing.

    Example:
        >>> sorted(topics_of(EditRequest("The mother tongue of Anna is", "Greek", subject="Anna")))
        ['language']
        >>> sorted(topics_of(EditRequest("Anna, from", "Rome", subject="Anna")))
        ['origin', 'place']
    """
    rest = _rest(request)
    topics = {name for name, cues in _TOPIC_OF.items() if cues.search(rest)}
    if not topics and rest.rstrip().endswith((" in", " from", " at", " on")):
        return frozenset(("origin", "place"))
    return frozenset(topics)


def kind_of_subject(request: EditRequest) -> str:
    """What kind of thing a request's subject is, by the words of the prompt and of the name: one of `KINDS`.

    Args:
        request: with a subject.

    Example:
        >>> kind_of_subject(EditRequest("The mother tongue of Anna is", "Greek", subject="Anna"))
        'person'
        >>> kind_of_subject(EditRequest("Old Lake Bank is led by", "Anna", subject="Old Lake Bank"))
        'organisation'
    """
    rest, name = _rest(request), _plain(request.subject or "")
    last = f" {name.split()[-1]} " if name.strip() else " "
    points = {
        kind: 2 * len(set(_KIND_ASKED[kind].findall(rest)))
        + len(set(_KIND_NAMED[kind].findall(name)))
        + 2 * bool(_KIND_NAMED[kind].search(last))
        for kind in KINDS
    }
    best = max(points.values())
    if best:
        return next(kind for kind in KINDS if points[kind] == best)
    words = (request.subject or "").split()
    capitals = [word for word in words if not _SMALL.fullmatch(word.casefold())]
    like_a_person = len(capitals) in (2, 3) and all(_WORD.fullmatch(word) and word[0].isupper() for word in capitals)
    return "person" if like_a_person and words[0].casefold() != "the" else "thing"


def choose_frames(request: EditRequest, count: int = 3, together: Iterable[EditRequest] = ()) -> list[Frame]:
    """Frames that ask something else about a request's subject than the request does.

    Which ones is drawn from the prompt's text, so that they are the same in every run and in every list.

    Args:
        request: with a subject; without one there are none.
        count: how many at most.
        together: requests that are edited as well; what those about the same subject ask is left out, too.

    Returns:
        Frames of the subject's kind.

    Example:
        >>> request = EditRequest("The currency of Peru is the", "euro", subject="Peru")
        >>> [frame.topics for frame in choose_frames(request)]
        [('school',), ('nature',), ('sights',)]
    """
    name = (request.subject or "").strip()
    if not name:
        return []
    same = [other for other in together if (other.subject or "").strip().casefold() == name.casefold()]
    asked = frozenset().union(*(topics_of(one) for one in (request, *same)))
    frames: Sequence[Frame] = FRAMES[kind_of_subject(request)]
    order = text_generator(request.prompt).permutation(len(frames))
    return [frames[place] for place in order if not asked.intersection(frames[place].topics)][:count]
