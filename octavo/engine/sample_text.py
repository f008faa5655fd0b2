"""A text of many kinds, which a model reads once at start where keys are compressed.

What its keys have in common is taken off all keys (`octavo.models.common_keys`). Keys of random ids
have other means than those of text. Every text would do; this one changes no more than formats do,
since what is stored depends on it.
"""

from __future__ import annotations

SAMPLE_TEXT = '''\
The harbour was quiet when the ferry came in. Two men with a ladder waited under the lamp, and a \
woman counted boxes from a list: "Twelve of glass, three of seed, one of letters. Who signs?" \
Nobody answered. In 1948 the old quay had been 260 metres long; since the flood it was shorter, \
and ships of more than 4,000 tonnes turned away to the north.

## How to set up the service

1. Install the package: `pip install example-service` (Python 3.10 or later).
2. Copy `settings.sample.json` to `settings.json` and choose a port that is free.
3. Start it with `example-service --config settings.json` and look at http://localhost:8000/health.

If the service does not start, the log says why. The most common cause is a port that another \
process has. See also the section on limits below.

```python
def moving_average(values: list[float], width: int) -> list[float]:
    """Returns the mean of each `width` neighbours."""
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        if index >= width - 1:
            means.append(total / width)
    return means
```

{"name": "get_weather", "arguments": {"city": "Lisbon", "days": 3, "units": "metric"}}
{"id": 71, "status": "ok", "items": [{"sku": "A-204", "count": 2, "price": 19.95}, {"sku": "B-7"}]}

User: What is the derivative of x^2 * sin(x), and where is it zero between 0 and 1?
Assistant: By the product rule it is 2x sin(x) + x^2 cos(x). Both are positive for 0 < x < 1, so \
it is zero only at x = 0. Let me check with numbers: at x = 0.5 it is about 0.70.

| Option | Type | Default | Meaning |
| --- | --- | --- | --- |
| `timeout` | seconds | 30 | how long a request may take |
| `retries` | integer | 2 | how often it is tried again |

Das Wetter bleibt morgen freundlich, nur im Norden regnet es am Abend. La biblioteca abre a las \
nueve y cierra a las ocho. Il faut que nous parlions de cette question avant la fin du mois. \
\u8bf7\u95ee\u8fd9\u672c\u4e66\u591a\u5c11\u94b1\uff1f\
\u0421\u043f\u0430\u0441\u0438\u0431\u043e, \u0432\u0441\u0451 \u0445\u043e\u0440\u043e\u0448\u043e.

The committee met again on Tuesday. It found that the rule had been written for a smaller town, \
that nobody had asked those who live by the river, and that the money would last until spring at \
the latest. "We can wait," the chair said, "but the water will not." After a long silence the \
engineer spread out her drawings, and for the first time that evening everyone leaned forward.
'''
