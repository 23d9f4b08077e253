"""The names, commands and words that the reader of mathematics knows."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FUNCTIONS = {
    name: name for name in _words("sin cos tan cot sec csc sinh cosh tanh exp ln log lg cbrt binom factorial")
}
FUNCTIONS |= {name: name for name in _words("asin acos atan abs floor ceil gcd lcm max min sqrt")}
FUNCTIONS |= {f"arc{name}": f"a{name}" for name in _words("sin cos tan cot sec csc")} | {"sgn": "sign"}
"""Spelling -> function."""

GREEK = frozenset(
    _words(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau"
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

NUMBER_WORDS = {
    word: index
    for index, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
            " seventeen eighteen nineteen twenty"
        )
    )
}
NUMBER_WORDS |= {
    word: 10 * index for index, word in enumerate(_words("thirty forty fifty sixty seventy eighty ninety"), 3)
}
NUMBER_WORDS |= {"hundred": 100}
SET_WORDS = dict.fromkeys(
    ("no solution", "no solutions", "no real solution", "no real solutions", "empty set"), "empty"
)
SET_WORDS |= dict.fromkeys(
    ("all real numbers", "all reals", "real numbers", "any real number", "all real number"), "R"
)
"""What names a set in words."""

SYNONYMS = {"dne": "does not exist"}
UNIT_SYMBOLS = frozenset(_words("m g s h l L"))
"""Units of one letter."""
NOT_UNITS = frozenset(_words("unit rad radian sq square cubic total in all the a an of each"))
"""Words beside a number that say nothing, or only repeat what an exponent says."""
