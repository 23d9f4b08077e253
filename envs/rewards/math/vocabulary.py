"""The names, commands and words that the reader of mathematics knows."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


FUNCTIONS = {
    name: name for name in _words("sin cos tan cot sec csc sinh cosh tanh exp ln log lg cbrt binom factorial")
}
FUNCTIONS |= {name: name for name in _words("asin acos atan abs floor ceil gcd lcm max min sqrt")}
FUNCTIONS |= {f"arc{name}": f"a{name}" for name in _words("sin cos tan cot sec csc")} | {"sgn": "sign"}
"""Spelling -> function."""

GREEK = frozenset(
    _words(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau"
        " upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar"
    )
)
CONSTANTS = {"pi": "pi"} | dict.fromkeys(_words("infty oo infinity inf Infinity"), "inf")
OPERATORS = dict(
    pair.split("=", 1)
    for pair in _words(
        "cdot=* times=* ast=* div=/ pm=pm mp=mp le=<= ge=>= ne=!= lt=< gt=> in=in cup=cup cap=cap setminus=setminus"
        " colon=: approx=~ sim=~ equiv=equiv to=to bmod=mod Leftrightarrow=iff %=%"
    )
)
"""LaTeX command -> kind of token."""

BRACKETS = {"{": "\\{", "}": "\\}", "lbrace": "\\{", "rbrace": "\\}", "langle": "<<", "rangle": ">>"}
BRACKETS |= {name: name for name in _words("lfloor rfloor lceil rceil")} | {"lbrack": "[", "rbrack": "]"}
OPENERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "<<": ">>", "lfloor": "rfloor", "lceil": "rceil"}
OPENERS |= {"begin": "end"}
CLOSERS = frozenset(OPENERS.values())

TEXT_COMMANDS = frozenset(
    _words("text textbf textit textrm textsf texttt textnormal mbox hbox mathrm rm operatorname")
)
FONTS = frozenset(
    _words("mathbf boldsymbol bm mathit mathsf mathcal vec hat bf it ensuremath overrightarrow underline")
)
SEPARATOR_WORDS = frozenset(("or", "and"))
SHORT_WORDS = frozenset(
    _words(
        "no on yes odd all any not one two six ten red is it in of to the are an at by if so am pm cm mm km kg mg ml ft"
        " lb lbs oz hr hrs mph kph day yd mi gal yr yrs wk rad deg cal mol mpg rpm hz usd pts dne bit cup can car cat"
        " dog hen pen pie box bag kid egg boy man men per"
    )
)
"""Words of two and three letters; other runs so short are variables side by side."""

SET_WORDS = dict.fromkeys(
    ("no solution", "no solutions", "no real solution", "no real solutions", "empty set"), "empty"
)
SET_WORDS |= dict.fromkeys(
    ("all real numbers", "all reals", "real numbers", "any real number", "all real number"), "R"
)
"""What names a set in words."""

SYNONYMS = {
    "right-angled triangle": "right triangle",
    **dict.fromkeys(
        _lines("dne|not exist|nonexistent|it does not exist|limit does not exist"), "does not exist"
    ),
    **dict.fromkeys(
        _lines("doesn t exist|doesnt exist|does not exist|undefined|not defined"), "does not exist"
    ),
    **dict.fromkeys(
        _lines("infinitely many|infinite|infinitely many solutions|infinite number|infinite solutions"),
        "infinity",
    ),
}
"""Words that say the same."""
_DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words("january february march april may june july august september october november december")
SHORT_NAMES = {name[:3]: name for name in (*_DAYS, *MONTHS)} | {"tues": "tuesday", "thur": "thursday"}
SHORT_NAMES |= {"thurs": "thursday", "sept": "september"}
"""Abbreviations of days and months."""
GENERIC_NOUNS = frozenset(_words("function number numbers triangle curve"))
"""What a last word adds nothing by, where the other answer has none: `odd function`."""
NUMBER_PROPERTIES = frozenset(_words("prime odd even positive negative composite rational irrational"))
FILLING_WORDS = frozenset(_words("all every any each is are number numbers"))
"""What is said of a number, and the words that only go with it: `all odd n`, `n is odd`."""
UNIT_SYMBOLS = frozenset(_words("m g s h l L N J W V A K T C F H M Pa"))
"""Units of one letter."""
NOT_UNITS = frozenset(
    _words("unit rad radian steradian sq square cubic total in all the a an of each time only exactly item")
)
"""Words beside a number that say nothing, or only repeat what an exponent says."""
NO_COUNTED_THINGS = frozenset(
    _words(
        "not no non nor never none isn't isnt aren't wasn't don't dont doesn't cannot can't wrong incorrect false"
        " invalid unknown undefined unclear uncertain unsure impossible nonsense error mistake typo guess possibly"
        " perhaps maybe probably likely presumably apparently hopefully or either else otherwise alternatively instead"
        " but except without unless if when while whether and over under above below least most between through is are"
        " was were be been being has have had do does did will would shall should can could may might must i we you he"
        " she it they this that these those who which what how why where because since so then thus hence therefore"
        " although though however yet still again almost nearly about around approximately roughly plus minus divided"
        " multiplied negative opposite inverse reciprocal half twice double triple factorial wait actually hmm sorry"
        " modulo mod base infinity than"
    )
)
"""Words beside a number that are not what it counts: they deny it, doubt it, bound it or change it."""
