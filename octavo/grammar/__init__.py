"""Grammars that outputs are held to. No torch.

`sources` makes one text of all that users ask for, `compiler` (over llguidance) matches it, `guide`
leads sequences in the engine and checks at the faces.
"""

from octavo.grammar.compiler import GrammarError, Matcher
from octavo.grammar.guide import Checker, Guide, Guides
from octavo.grammar.sources import grammar_text
from octavo.grammar.vocabulary import Vocabulary

__all__ = ["Checker", "GrammarError", "Guide", "Guides", "Matcher", "Vocabulary", "grammar_text"]
