"""The tool of this example. A tool is a typed function with a docstring, which the model gets to see."""

import operator
import re

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculate(expression: str) -> int:
    """Compute the value of an expression.

    Args:
        expression: two whole numbers with +, - or * between them, such as 12 * 7
    """
    parts = re.fullmatch(r" *(\d{1,6}) *([-+*]) *(\d{1,6}) *", expression)
    if parts is None:
        raise ValueError(f"got {expression!r}, expected an expression such as 12 * 7")  # the model reads this
    return OPERATORS[parts[2]](int(parts[1]), int(parts[3]))
