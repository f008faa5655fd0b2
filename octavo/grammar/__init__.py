"""Grammars that outputs are held to. No torch.

`sources` makes one text of all that users ask for, `compiler` (over llguidance) matches it,
`checker` refuses at the faces, `guide` leads sequences in the engine, both compiling in
`deep_threads`.
"""

from octavo.grammar.checker import Checker
from octavo.grammar.compiler import GrammarError, Matcher
from octavo.grammar.guide import Guide, Guides
from octavo.grammar.sources import grammar_text
from octavo.grammar.vocabulary import Vocabulary

__all__ = ["Checker", "GrammarError", "Guide", "Guides", "Matcher", "Vocabulary", "grammar_text"]
