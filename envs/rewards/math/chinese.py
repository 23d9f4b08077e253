"""The words of Chinese answers, in English: units, counters, joining words and what is said of solutions."""

from __future__ import annotations

import re


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
