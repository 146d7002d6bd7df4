"""Whether a thought betrays that its writer was told the label, or saw an earlier attempt: a student cannot learn from what it will not be shown.

In:   "Dogs are animals, and since the label is 1, the hypothesis follows."
Out:  "since the label is 1"

Words only, no understanding: a table of telling phrases, tried in order. A conclusion such as "so the label is 1" is no sign, nor is a label on a bottle.
"""

import re

_VALUE = r"(?:[01]\b|(?:an? )?(?:no|non|not)[- ]?entail\w*|(?:an? )?entail\w*)"
_LABEL = r"(?:label|classification)"
_IS = r"(?:is|was|being|says|must be|has to be|should be|equals|of)"
# "the given label on the jar" is a thing in the world; "the given label of this pair" is ours.
_OURS = (
    r"(?!\s+(?:on|of|for|from|attached|sewn|printed)\b(?!\s+(?:this|the)\s+(?:pair|example|row|case|task|question)\b))"
)
_GIVEN = (
    r"(?:given|provided|stated|supplied|specified|assigned|actual|expected|target|reference|known|required|desired)"
)
_EARLIER = r"(?:initial|original|earlier|previous|prior|wrong|incorrect|flawed)"
_ITS = r"(?:the|my|this|that|their|an?)"
_WE_ARE = r"\b(?:we|I|you) (?:are|am|were|was|have been|had been)(?: already| also)?"
_CONCLUSION_NOUN = r"(?:attempt|answer|judge?ment|analysis|conclusion)"
_FAULT = (
    r"(?:is|was|were|had|did|overlook\w*|miss(?:ed|es)|fail(?:ed|s)|assume[ds]|ignore[ds]"
    r"|incorrectly|wrongly|mistakenly|reached|claim(?:ed|s)|said|says|concluded)"
)

_TELLING = [
    # names of what only the prompt shows
    rf"\b(?:true|ground[- ]truth|correct|right)[ _]{_LABEL}\b{_OURS}",
    r"\bground[- ]truth\b",
    rf"\bthe gold(?:en)?[ -]label\b{_OURS}(?=\s+{_IS}\b|[.,;:])",
    rf"\bthe {_GIVEN} {_LABEL}\b{_OURS}",
    rf"\bthe {_LABEL} (?:is |was |we are |we were )?(?:given|told|provided|supplied) (?:above|here|in the (?:prompt|task|input)|(?:is|was|as) {_VALUE})",
    rf"\bthe (?:true|correct|right|expected|known|given) answer {_IS} (?:given as )?{_VALUE}",
    # the label as a reason
    rf"\b(?:since|because|given that|as|knowing that|considering that|seeing that) the (?:{_LABEL}|answer) {_IS} {_VALUE}",
    rf"\b(?:because of|given|due to|according to|as required by) the {_LABEL}(?: of)? {_VALUE}",
    rf"\bthe {_LABEL} (?:says|tells us|states|indicates|confirms|requires|implies|suggests|shows)(?: that)? (?:it is )?"
    rf"(?:{_VALUE}|(?:the|this) (?:hypothesis|premise|pair)\b)",
    rf"\bto (?:reach|match|justify|support|arrive at|fit|obtain) the {_LABEL}\b{_OURS}",
    rf"\b(?:consistent|in line) with the {_LABEL}(?=[.,;]|\s*$)",
    # being told
    rf"{_WE_ARE} (?:told|given|shown|informed of)(?: that)? (?:the|its) (?:true |correct |right )?{_LABEL}\b{_OURS}",
    rf"{_WE_ARE} (?:told|informed|given)(?: that)? the answer (?:is|was) {_VALUE}",
    rf"\b(?:been|not|was|were) told (?:the|its|what the|which) {_LABEL}\b",
    r"\b(?:pair|example|row|hypothesis|case|it) (?:is|was|has been) (?:already |actually |officially )?"
    rf"(?:labell?ed|annotated|marked) (?:as |with )?(?:label )?{_VALUE}",
    r"\bannotators? (?:say|says|said|chose|give|gave|labell?ed|mark|marked|decided|agree)\b",
    # an earlier attempt
    rf"\b{_ITS} {_EARLIER} (?:reasoning|thought[- ]process|prediction|predicted label|{_LABEL}|chain of thought)\b{_OURS}",
    rf"\b{_ITS} {_EARLIER} {_CONCLUSION_NOUN} {_FAULT}\b",
    rf"\b(?:unlike|contrary to|as opposed to|in contrast to|correcting|revisiting) {_ITS} {_EARLIER} {_CONCLUSION_NOUN}\b",
    r"\bpredicted label (?:is|was|of [01] (?:is|was)|must have been) (?:wrong|incorrect|mistaken|false|not)\b",
    rf"\b(?:wrongly|incorrectly|mistakenly|previously|originally) (?:predicted|labell?ed|classified|judged) (?:as )?{_VALUE}",
    rf"\b(?:should|must) have been (?:labell?ed |predicted |classified )?(?:as )?{_VALUE}",
]
_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in _TELLING), re.IGNORECASE)
# "Therefore, the correct label is 0." ends many a thought whose writer was told nothing.
_CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence|so|consequently|conclu\w+|finally|step \d+)\b[^.;!?]*$", re.IGNORECASE
)
_CONCLUDED = re.compile(r"(?:the )?(?:correct|right) (?:label|classification)$", re.IGNORECASE)
_STATED = re.compile(
    rf"\s*(?:is|must be|should be|would be|=|:)\s*\"?{_VALUE}\"?(?!\W+(?:not|rather|instead)\b)", re.IGNORECASE
)


def betrays_label(thought: str) -> str | None:
    """The first phrase that tells that the writer knew the label or saw an earlier attempt, or None."""
    for found in _PATTERN.finditer(thought):
        concluded = _CONCLUDED.search(found[0]) and _STATED.match(thought, found.end())
        if not (concluded and _CONCLUSION.search(thought, max(0, found.start() - 200), found.start())):
            return found[0].strip()
    return None
