"""From the text of an answer to tokens: first one spelling of what is spelled in many ways, then numbers, names, words.

`normalise` is textual and linear in the length; `lex` reads what it leaves. The module is long for its vocabulary: the
commands, names and words, English and Chinese, that the reader of mathematics knows.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.verdict import TooLarge, Unreadable


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


def _pairs(text: str) -> dict[str, str]:
    """`千克=kg 无解=no_solution` as a mapping, with spaces for underscores."""
    return dict(pair.replace("_", " ").split("=", 1) for pair in text.split())


_LENGTHS = _pairs("千米=km 公里=km 厘米=cm 毫米=mm 分米=dm 微米=um 纳米=nm 米=m")
_WORDS = {
    **{f"平方{name}": f"square {unit}" for name, unit in _LENGTHS.items()},
    **{f"立方{name}": f"cubic {unit}" for name, unit in _LENGTHS.items()},
    **_LENGTHS,
    **_pairs(
        "千克=kg 公斤=kg 毫克=mg 克=gram 吨=tonne 毫升=ml 升=liter 公顷=hectare 英寸=inch 英尺=foot 英里=mile"
        " 小时=hour 分钟=minute 秒=second 天=day 日=day 周=week 星期=week 个月=month 月=month 年=year 摄氏度=celsius"
        " 度=degree 元=yuan 美元=dollar 欧元=euro 日元=yen 角=jiao 牛顿=newton 牛=newton 焦耳=joule 焦=joule 瓦=watt"
        " 千瓦=kilowatt 伏=volt 安培=ampere 欧姆=ohm 赫兹=hertz 帕=pascal 每=per 万=tenthousand 亿=hundredmillion"
        " 上午=am 下午=pm"
    ),
    **_pairs(
        "或者=or 或=or 以及=and 和=and 与=and 且=and 及=and 等于== 大于=> 小于=< 不等于=!= 答案= 答= 共= 第="
        " 无实数解=no_solution 没有解=no_solution 无解=no_solution 无实根=no_solution 不存在=does_not_exist"
        " 无穷多=infinitely_many 无数=infinitely_many 空集=empty_set 全体实数=all_real_numbers"
        " 任意实数=all_real_numbers 一切实数=all_real_numbers 实数=all_real_numbers 正确=true 错误=false 是=yes 否=no"
        " 对=true 错=false"
        " 奇数=odd 偶数=even 奇函数=odd_function 偶函数=even_function 增函数=increasing 减函数=decreasing"
        " 星期一=monday 星期二=tuesday 星期三=wednesday 星期四=thursday 星期五=friday 星期六=saturday 星期日=sunday"
        " 星期天=sunday 等边三角形=equilateral_triangle 等腰三角形=isosceles_triangle 直角三角形=right_triangle"
    ),
    **dict.fromkeys(
        "个人只本支次件名位条张棵辆岁种组块道页根头袋箱瓶盒朵台双套副份间座艘架枚粒颗片排行列队班户家",
        "item",
    ),
}
_PATTERN = re.compile("|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)))
_MOMENT = re.compile(
    r"(?P<half>上午|下午)?\s{0,4}(?P<hour>\d{1,2})[时点](?P<minute>\d{2})分?(?!钟)", re.ASCII
)


def in_english(text: str) -> str:
    """The text with English for the Chinese words that stand in answers."""
    if found := _MOMENT.fullmatch(text.strip()):
        return f"{found['hour']}:{found['minute']} {_WORDS[found['half']] if found['half'] else ''}".strip()
    return _PATTERN.sub(lambda found: f" {_WORDS[found[0]]} ", text)


# ruff: noqa: RUF001  the characters that look like others are what this module is about


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]")
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-zπ]|(?=[({\\]))")
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"
    " omega"
)
_CAPITALS = "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    **dict.fromkeys("·⋅∙•×✕✖∗＊", "*"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **_pairs("÷=/ ⁄=/ ∕=/ ∶=: ℓ=l ⅈ=i 。=. 、=, ，=, ″=\" “=\" ”=\" ‘=' ′=' ’='"),
    **{sign: f"\\mathbb{{{name}}}" for sign, name in zip("ℕℚℂℝℤ", "NQCRZ", strict=True)},
    **{sign: f"\\{name} " for sign, name in zip("αβγδεζηθικλμνξπρστυφχψω", _GREEK.split(), strict=True)},
    **{sign: f"\\{name} " for sign, name in zip("ΓΔΘΛΞΣΦΨΩ", _CAPITALS.split(), strict=True)},
    **{
        sign: f"\\{name} "
        for sign, name in _pairs(
            "≤=le ⩽=le ≦=le ≥=ge ⩾=ge ≧=ge ≠=ne ≈=approx ±=pm ∓=mp ∞=infty ϕ=phi ϵ=epsilon ϑ=theta µ=mu Ω=Omega ℏ=hbar"
            " ħ=hbar ∠=angle △=triangle ≡=equiv →=to ∂=partial ∪=cup ∩=cap ∈=in ∅=emptyset ⌀=emptyset ∖=setminus"
            " °=degree º=degree ˚=degree …=ldots ⋯=ldots ∑=sum ∏=prod ∫=int ⟨=langle ⟩=rangle ⌊=lfloor ⌋=rfloor"
            " ⌈=lceil ⌉=rceil"
        ).items()
    },
}
_TRANSLATION = str.maketrans(_CHARACTERS)

_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|displaystyle|textstyle|scriptstyle"
    r"|limits|nolimits|middle|mathstrut|phantom\{[^{}]*\}|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\})(?![A-Za-z])"
)
_DECORATIONS = re.compile(
    r"\\(?:(?:text)?color(?:\[[^\[\]]*+\])?|colorbox|bbox|label|tag\*?|enclose)\s*+(?:\{[^{}]*+\}|\[[^\[\]]*+\])"
    r"|\\fcolorbox\s*+\{[^{}]*+\}\s*+\{[^{}]*+\}"
    r"|\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|boldmath|noindent|nonumber|notag"
    r"|strut|null|centering|checkmark|blacksquare|square|qed)(?![A-Za-z])"
)
_HTML = re.compile(r"</?(?:b|i|em|strong|u|span|p|div|br|center|mark|code)(?:\s[^<>]*+)?/?>", re.IGNORECASE)
_HTML_SCRIPT = re.compile(r"<(sup|sub)>([^<>]*+)</\1>", re.IGNORECASE)
_DOUBLED = re.compile(
    r"(?<!\\)\\\\(?=(?:d?frac|sqrt|text|mathrm|mathbf|left|right|pi|cdot|times|boxed|infty|pm|le|ge|in|cup|circ|angle)"
    r"(?![A-Za-z]))"
)
"""A backslash written twice, as in a JSON string; a row of a matrix ends so, too."""
_TIMES = re.compile(r"(?<=\d)\s*+[xX]\s*+(?=10\s*+(?:\^|\*\*))|(?<=\d)\s[xX]\s(?=\d)")
_UNDERBRACE = re.compile(
    r"\\underbrace\s*+\{\s*+(\d)\1*+\s*+(?:\\(?:ldots|cdots|dots)|\.\.\.)\s*+\1++\s*+\}\s*+_\s*+\{\s*+(\d++|[a-z])"
    r"(?:\\?\s|\\text|\\,|~)?[^{}]*+(?:\{[^{}]*+\})?\s*+\}"
)
_GROUPED = (
    (re.compile(r"([-+]?)(\d{1,3}(?:_\d{3})++(?:\.\d++)?)", re.ASCII), "_"),
    (re.compile(r"([-+]?)(\d{1,3}(?:'\d{3})++(?:\.\d++)?)", re.ASCII), "'"),
    (re.compile(r"([-+]?)(\d{1,3}(?:\.\d{3}){2,}+(?:,\d++)?|\d{1,3}(?:\.\d{3})++,\d++)", re.ASCII), "."),
)
_EMPTY_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")
_SAME_COMMANDS = _pairs(
    "dfrac=frac tfrac=frac cfrac=frac nicefrac=frac sfrac=frac dbinom=binom tbinom=binom leq=le leqslant=le leqq=le"
    " geq=ge geqslant=ge geqq=ge neq=ne varnothing=emptyset O=emptyset bigcup=cup bigcap=cap backslash=setminus"
    " dots=ldots cdots=ldots dotsc=ldots dotsb=ldots varphi=phi varepsilon=epsilon vartheta=theta varrho=rho"
    " bar=overline lvert=| rvert=| vert=| mid=| Re=mathbb{R} R=mathbb{R} reals=mathbb{R} iff=Leftrightarrow"
    " lor=text{_or_} vee=text{_or_} land=text{_and_} wedge=text{_and_}"
)
_SAME = re.compile(r"\\(" + "|".join(sorted(_SAME_COMMANDS, key=len, reverse=True)) + r")(?![A-Za-z])")
_DEGREES = re.compile(
    r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degrees?(?![A-Za-z])"
)
_SHORT_FRACTIONS = (
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*(\{[^{}]*\})\s*([0-9A-Za-z])"), r"\\frac\1{\2}"),
)
_THIN_SPACES = re.compile(r"(?<=\d)(?:\\[,;:!]|~|\\ |[\u00a0\u2009\u202f\u2005])(?=\d{3}(?!\d))")
_BRACED_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:! ]|(?:quad|qquad|enspace|thinspace|space|hfill)(?![A-Za-z]))|~|[\u00a0\u2009\u202f\u2005]"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/_^}])\d{1,3}(?: \d{3})+(?![\d/])")
_MATH_DELIMITERS = re.compile(r"\\[()\[\]]")
_DOLLARS = re.compile(r"(?<!\\)\$\$?([^$]*?)(?<!\\)\$\$?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_NEEDS_CLEANING = re.compile(r"[\\$~*`{_]")
_CHOOSE = re.compile(r"\{([^{}\\]*+(?:\\(?!choose)[^{}\\]*+)*+)\\choose\s([^{}]*+)\}")


def normalise(text: str) -> str:
    """The same answer in plain ASCII LaTeX, without spacing, sizing and math delimiters."""
    if not text.isascii():
        text = _to_ascii(text)
    text = _ungrouped(text.strip())
    if "<" in text and "/" in text:
        text = _HTML.sub("", _HTML_SCRIPT.sub(_script, text))
    text = _TIMES.sub("*", text)
    if not _NEEDS_CLEANING.search(text):
        return _SPACED_THOUSANDS.sub(_without_spaces, text)
    text = _strip_markdown(text)
    if "\\\\" in text and "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _DECORATIONS.sub("", text)
    text = _UNDERBRACE.sub(r"(\1*(10^{\2}-1)/9)", text)
    text = _BRACED_COMMA.sub(",", text)
    text = _THIN_SPACES.sub("", text)
    text = _EMPTY_DELIMITER.sub("", text)
    text = _DROPPED.sub("", text)
    text = _SAME.sub(
        lambda found: "|" if _SAME_COMMANDS[found[1]] == "|" else "\\" + _SAME_COMMANDS[found[1]], text
    )
    text = _DEGREES.sub(r"\\degree ", text)
    text = _MATH_DELIMITERS.sub(" ", text)
    text = _DOLLARS.sub(r"\1", text)
    text = _BOX.sub("", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    if "\\frac" in text:
        for pattern, replacement in _SHORT_FRACTIONS:
            text = pattern.sub(replacement, text)
    if "\\equiv" in text and "mod" not in text:
        text = text.replace("\\equiv", "=")
    text = _SPACES.sub(" ", text.replace("**", "^").replace("\\%", "%")).strip()
    return _SPACED_THOUSANDS.sub(_without_spaces, text)


def _to_ascii(text: str) -> str:
    text = _ROOT_SIGN.sub(
        lambda found: rf"\sqrt{_ROOT_INDEX[found[1]]}" + (f"{{{found[2]}}}" if found[2] else ""), text
    )
    text = _SUPERSCRIPT_RUN.sub(lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT_RUN.sub(lambda found: f"_{{{found[0].translate(_SUBSCRIPTS)}}}", text)
    text = _VULGAR.sub(
        lambda found: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", found[0]).split("⁄")), text
    )
    text = text.translate(_TRANSLATION)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_TRANSLATION)
    return text if text.isascii() else in_english(text)


def _ungrouped(text: str) -> str:
    """A number whose digits are grouped by underscores, apostrophes or, with a decimal comma, by dots."""
    for pattern, sign in _GROUPED:
        if found := pattern.fullmatch(text):
            return found[1] + found[2].replace(sign, "").replace(",", ".")
    return text


def _script(found: re.Match[str]) -> str:
    return ("^" if found[1].lower() == "sup" else "_") + f"{{{found[2]}}}"


def _strip_markdown(text: str) -> str:
    """The text without the asterisks, underscores or backticks that set all of it in bold or as code."""
    for mark in ("**", "__", "`", "*"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    return text


def _without_spaces(found: re.Match[str]) -> str:
    return found[0].replace(" ", "")


MAX_TOKENS = 8_000
MAX_EXPONENT = 400
"""Of a number written with an exponent: 1e999 is refused."""

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)
    |\\(?P<command>[A-Za-z]+|.)
    |(?P<word>[^\W\d_]++)
    |(?P<two><=|>=|!=|==|->)
    |(?P<one>.)""",
    re.VERBOSE | re.DOTALL,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)")
_ARGUMENT = re.compile(r"(?<!\s)\s*+\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_ENVIRONMENT = re.compile(r"(?<!\s)\s*+\{([a-zA-Z]+\*?)\}(?:\{[lcr| ]*\})?")
_REPEATING = re.compile(
    r"(?<!\d)(\d*+)\.(\d*+)(?:\\overline\s*\{(\d+)\}|\\overline\s*(\d)|\\dot\s*\{?(\d)\}?|\((\d+)\))"
)
_JOINED = re.compile(r"(?<!\S)(or|and)(?!\S)", re.IGNORECASE)
_DOTTED = re.compile(r"(?<!\d)(\d*+)\.(\d{2,40})(?:\\ldots|\.\.\.++)")


@dataclass(frozen=True, slots=True)
class Token:
    """`kind`: number, name, const, fn, text, command, open, close, sep, or the operator itself."""

    kind: str
    text: str
    value: Fraction | None = None
    spaced: bool = False
    """Whether white space stands before it."""


def lex(text: str, *, thousands: bool = True) -> list[Token]:
    """The tokens of a normalised text.

    Args:
        thousands: Whether 1,000 outside of brackets is one number.

    Raises:
        Unreadable: a character that no answer has.
        TooLarge: too many tokens, or a number beyond the caps.
    """
    tokens: list[Token] = []
    position, spaced, level = 0, False, 0
    while position < len(text):
        if len(tokens) > MAX_TOKENS:
            raise TooLarge("too many tokens")
        if special := _special_number(text, position, thousands and level == 0, tokens):
            value, position = special
            tokens.append(Token("number", "", value, spaced))
            spaced = False
            continue
        found = _TOKEN.match(text, position)
        assert found is not None
        position = found.end()
        kind = found.lastgroup
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            tokens.append(Token("number", found[0], _decimal(found[0]), spaced))
        elif kind == "word":
            tokens.extend(_word(found[0], spaced))
        elif kind == "command":
            position = _command(text, position, found["command"], spaced, tokens)
        else:
            if found[0] not in _SYMBOLS:
                raise Unreadable(found[0])
            tokens.append(Token(*_SYMBOLS[found[0]], None, spaced))
        if tokens and kind in ("one", "command"):
            last = tokens[-1]
            level += (last.kind == "open" and last.text != "{") - (last.kind == "close" and last.text != "}")
        spaced = False
    return tokens


def _special_number(
    text: str, position: int, thousands: bool, tokens: list[Token]
) -> tuple[Fraction, int] | None:
    """Numbers with thousands separators, and repeating decimals."""
    if not (text[position].isdigit() or text[position] == "."):
        return None
    if tokens and tokens[-1].kind in ("_", "command"):
        return None
    if (
        thousands
        and (found := _THOUSANDS.match(text, position))
        and not (position and text[position - 1] == ",")
    ):
        return Fraction(found[0].replace(",", "")), found.end()
    if found := _REPEATING.match(text, position):
        whole, fixed = found[1] or "0", found[2]
        period = found[3] or found[4] or found[5] or found[6]
        if len(fixed) + len(period) > MAX_EXPONENT:
            raise TooLarge("digits")
        return _repeating(whole, fixed, period), found.end()
    if found := _DOTTED.match(text, position):
        for size in range(1, len(found[2]) // 2 + 1):
            period = found[2][-size:]
            repeats = 3 if size == 1 else 2
            if found[2].endswith(period * repeats):
                return _repeating(found[1] or "0", found[2], period), found.end()
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int(whole + fixed), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 4_000 or (exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT)):
        raise TooLarge("digits")
    whole, _, part = mantissa.partition(".")
    value = Fraction(int(whole + part or "0"), 10 ** len(part))
    return value * Fraction(10) ** int(exponent) if exponent else value


_LETTERS = {
    **{name: ("sep", name) for name in SEPARATOR_WORDS},
    **{name: ("name", name) for name in GREEK},
    **{name: ("const", value) for name, value in CONSTANTS.items()},
    **{name: ("fn", value) for name, value in FUNCTIONS.items()},
}
"""Kind and text of what runs of letters stand for."""
_COMMANDS = {
    **{name: what for name, what in _LETTERS.items() if name not in (*SEPARATOR_WORDS, "sqrt", "binom")},
    **{name: (kind, name) for name, kind in OPERATORS.items()},
    **{name: ("close" if text in CLOSERS else "open", text) for name, text in BRACKETS.items()},
    **{name: ("currency", name) for name in ("$", "pounds", "euro")},
    "\\": ("row", "\\"),
    "emptyset": ("set", "empty"),
}
_SYMBOLS = {
    **{symbol: (symbol, symbol) for symbol in ("<=", ">=", "!=", *"+-*/^_=<>!|:%&'.")},
    **{symbol: ("sep", symbol) for symbol in ",;"},
    **{symbol: ("open", symbol) for symbol in "([{"},
    **{symbol: ("close", symbol) for symbol in ")]}"},
    **{symbol: ("currency", symbol) for symbol in "$€£¥₹"},
}


def _word(word: str, spaced: bool) -> list[Token]:
    """A run of letters: a function, a constant, a separator, a word, or variables side by side."""
    if not word.isascii():
        return [Token("text", word, None, spaced)]
    if len(word) == 1:
        return [Token("name", word, None, spaced)]
    if word in _LETTERS:
        return [Token(*_LETTERS[word], None, spaced)]
    if len(word) > 3 or word.lower() in SHORT_WORDS:
        return [Token("text", word, None, spaced)]
    for name in ("pi", "ln"):  # as in 2xpi
        if word.endswith(name) and len(word) == 3:
            return [Token("name", word[0], None, spaced), Token(*_LETTERS[name])]
    return [Token("name", letter, None, spaced and index == 0) for index, letter in enumerate(word)]


def _command(text: str, position: int, command: str, spaced: bool, tokens: list[Token]) -> int:
    """Append what a LaTeX command stands for; returns the position after it."""
    if command in TEXT_COMMANDS:
        found = _ARGUMENT.match(text, position)
        if found is None:
            return position
        tokens.extend(_text(found[1], spaced))
        return found.end()
    if command in ("begin", "end"):
        found = _ENVIRONMENT.match(text, position)
        if found is None:
            raise Unreadable("an environment without a name")
        tokens.append(Token("open" if command == "begin" else "close", command, None, spaced))
        tokens.append(Token("env", found[1])) if command == "begin" else None
        return found.end()
    if command == "mathbb":
        found = _ARGUMENT.match(text, position)
        letter = found[1].strip() if found else text[position : position + 1]
        tokens.append(Token("set", letter, None, spaced))
        return found.end() if found else position + 1
    if command in FONTS:
        return position
    tokens.append(Token(*_COMMANDS.get(command, ("command", command)), None, spaced))
    return position


def _text(content: str, spaced: bool) -> list[Token]:
    """The tokens of the argument of \\text: separators, a variable or number, or words."""
    stripped = content.strip(" .")
    if stripped in SEPARATOR_WORDS or stripped in (",", ";"):
        return [Token("sep", stripped, None, spaced)]
    if stripped == "":
        return []
    if stripped[0].isdecimal() or (
        len(re.findall("[A-Za-z]", stripped)) < 2 and stripped not in UNIT_SYMBOLS and "\\" not in stripped
    ):
        return lex(stripped)
    parts = _JOINED.split(stripped)
    tokens: list[Token] = []
    for index, part in enumerate(parts):
        if index % 2:
            tokens.append(Token("sep", part.lower(), None, True))
        elif part:
            tokens += _text(part, True) if len(parts) > 1 else [Token("text", part, None, True)]
    return tokens
