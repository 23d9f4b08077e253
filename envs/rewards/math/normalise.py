"""One spelling for what LaTeX and Unicode spell in many ways. Everything here is textual and linear in the length."""

# ruff: noqa: RUF001  the characters that look like others are what this module is about

from __future__ import annotations

import re
import unicodedata

from polyturn.envs.rewards.math.chinese import in_english

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
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "∶": ":",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≦": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    **{letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξπρστυφχψω", _GREEK.split(), strict=True)},
    **{letter: f"\\{name} " for letter, name in zip("ΓΔΘΛΞΣΦΨΩ", _CAPITALS.split(), strict=True)},
    "ϕ": r"\phi ",
    "ϵ": r"\epsilon ",
    "ϑ": r"\theta ",
    "µ": r"\mu ",
    "Ω": r"\Omega ",
    "ℏ": r"\hbar ",
    "ħ": r"\hbar ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "≡": r"\equiv ",
    "→": r"\to ",
    "∂": r"\partial ",
    "ℓ": "l",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "″": '"',
    "“": '"',
    "”": '"',
    "‘": "'",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⌀": r"\emptyset ",
    "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "°": r"\degree ",
    "º": r"\degree ",
    "˚": r"\degree ",
    "′": "'",
    "’": "'",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "ⅈ": "i",
    "。": ".",
    "、": ",",
    "，": ",",
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
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
_SAME_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    "neq": "ne",
    **dict.fromkeys(("varnothing", "O"), "emptyset"),
    "bigcup": "cup",
    "bigcap": "cap",
    "backslash": "setminus",
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb"), "ldots"),
    "varphi": "phi",
    "bar": "overline",
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("Re", "R", "reals"), "mathbb{R}"),
    "varepsilon": "epsilon",
    "vartheta": "theta",
    "varrho": "rho",
    "iff": "Leftrightarrow",
    "lor": "text{ or }",
    "vee": "text{ or }",
    "land": "text{ and }",
    "wedge": "text{ and }",
}
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
