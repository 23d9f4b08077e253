"""English function words, which the BM25 index drops.

Most questions are full of them (who, when, did), most passages too, and they tell no passage from another: with them a
search costs several times as much.
"""

from __future__ import annotations

_WORDS = (
    "a about above after again against all am an and any are as at be because been before being below "
    "between both but by could did do does doing during each for from further had has have having he her "
    "here herself him himself his how i if in into is it its itself me more most my no nor not of off on "
    "once only or other our ourselves out over own same she should so some such than that the their them "
    "themselves then there these they this those through to too under until very was we were what when "
    "where which while who why will with would you your yourself "
)
STOP_WORDS = tuple(_WORDS.split())
