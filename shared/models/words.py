"""The whole words of the built tokenizer: frequent in reasoning-gym's questions, which become a third as long by them.

Changing a word changes the token ids of every model built so far: the list is fixed.
"""

from __future__ import annotations

BARE_WORDS = ("system", "user", "assistant", "State")
"""Tokens where no space stands before the word: the roles of the chat template, the first word of many questions."""

SPACED_WORDS = tuple(
    """
    AND All Always Answer Calculate Each Example False Find For Give Given Here How If In Input Let Note Only Output
    Please Provide Reply Return She Solve The Then These They True Use What When You Your above according adjacent
    after all also an and angle angles another answer answers antiderivative any applied applying are arithmetic
    array as back be becomes been before being below between binary board bottom box but by calculations called can
    cannot case cell cells certain character characters child code color column comma common completed conclusion
    connected consider consisting constraints contain contains convert coordinates correct corresponding count cube
    current cycle day days decimal degrees destination determine different digits directly division does down each
    either element elements else empty end equal equation even every exact exactly example examples exponents
    expression false fill filled final find first follow following follows for form format formatted formatting
    found fraction from front function further game generated given goal graph greater grid group guidelines has
    have how if impossible in include indefinite initial input instead instructions integers interfere into is it
    its itself job just keys last least left less letter letters light like line lines list lists logic make many
    map maps marks match matrix maximum may means minimum modified more most move moves moving multiple
    multiplication must name names need new next not notation number numbers object objects of off on once one only
    operations or order other otherwise output over pair part people perform performing place places please possible
    prime probability problem process program provide put puzzle question quotes randomly reach reasoning red
    reduced repeated replace reply represent representing represents respond result return right row rows rule rules
    same satisfies search second sentence separated sequence should sign significant single size smaller solution
    solutions solve some space spaces specified square squares start state statements step steps string strings such
    symbol symbols system takes target task test text than that the their them then there these they this three
    through time times to top topology total true turn two unique units until use used using valid value values
    variable vertical vertices was what when whenever where which while who will with within without word words
    would wrapping write writing year you your zero
    """.split()  # noqa: SIM905
)
"""Tokens together with the space before them."""
