"""
Which way a one-shot goes: by what its statement is, and by how long it took before.

Three ways. A *plain read* that was quick before may be sent behind others like it on a shared
connection. What writes, locks, calls a function that is not known to be harmless, or was slow
before, has a connection to itself. And what may be several statements in one string, or none of
those that read or write rows, goes through psycopg's cursor, as if there were no lanes.

A plain read may be run twice, and nobody can tell: so whoever is sent behind one that turns out
slow can be sent again elsewhere. That is why in doubt a statement is none; one that writes all the
same, by a view say, is refused when it is run again, which is remembered. The text is looked at
once; no parser is needed for that, since each doubt leads to a slower way, and none to a wrong
one.
"""

from __future__ import annotations

import re
from enum import IntEnum
from time import monotonic

MOST = 1024
"""How many texts are remembered."""

LONGEST = 4096
"""Characters of the longest text that is looked at; psycopg remembers none that is longer."""

PENALTY, MOST_PENALTY = 16, 1024
"""Quick runs that a text which was slow needs until it shares again; twice as many each time."""

FORGIVEN = 60.0
"""Seconds after which it is as if a text had never been slow."""


class Way(IntEnum):
    """How a statement may be run."""

    CURSOR = 0
    ALONE = 1
    SHARED = 2


class Known:
    """
    What is known of one text.

    Attributes:
        way: The best that its words allow.
        numbers: True if it numbers its parameters, as PostgreSQL does: ``$1``.
        shares: True if it may be sent behind others, and others behind it.
    """

    __slots__ = ("_penalty", "_quick", "_slow_at", "numbers", "shares", "way")

    def __init__(self, way: Way, numbers: bool = False) -> None:
        self.way = way
        self.numbers = numbers
        self.shares = False
        self._quick = -1
        self._penalty = PENALTY
        self._slow_at = 0.0

    def was_quick(self) -> None:
        """Note a quick run: the first is enough for a text of which nothing else is known."""
        self._quick += 1
        if self._quick >= 0 and self.way is Way.SHARED:
            self.shares = True

    def was_slow(self) -> None:
        """Note a slow run: it has a connection to itself for a while."""
        self.shares = False
        last, self._slow_at = self._slow_at, monotonic()
        if self._slow_at - last > FORGIVEN:
            self._penalty = PENALTY
        self._quick = -self._penalty
        self._penalty = min(2 * self._penalty, MOST_PENALTY)

    def writes(self) -> None:
        """Note that it writes, whatever its words say: it has a connection to itself from now."""
        self.way = Way.ALONE
        self.shares = False


_BY_CURSOR = Known(Way.CURSOR)


class Texts:
    """What is known of the texts that were run, of the last `MOST` of them."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def known(self, query: object) -> Known:
        """Return what is known of *query*, having looked at it if nothing was."""
        known = self._known.get(query) if type(query) is str else _BY_CURSOR
        if known is None:
            assert isinstance(query, str)
            known = Known(way_of(query), numbers_parameters(query))
            if len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            self._known[query] = known
        return known


# As PostgreSQL's lexer has it: a comment ends with its line, and any character that is not ASCII
# may be in a name.
_BEFORE = re.compile(r"(?:\s|\(|--[^\n\r]*[\n\r]|/\*[^*]*\*/)*")
_WORD = re.compile(r"[a-z_][a-z0-9_$]*")
_CALL = re.compile(r'([a-z_"\x80-\U0010ffff][\w$."\x80-\U0010ffff]*)\s*\(')
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n\r]*|/\*[^*]*\*/")
_DOT = re.compile(r"\s*\.\s*")
_NUMBER = re.compile(r"\$[0-9]")

_READS = frozenset({"select", "values", "table", "with"})
_WRITES = frozenset({"insert", "update", "delete", "merge"})
# The settings are among them, as is current_setting(): a copy runs read-only, and that is one.
_NOT_PLAIN = _WRITES | {"into", "for", "lock", "uescape", "pg_settings"}

_WORDS = """
    select values from where and or not in any some all exists as over on using by having when
    then else case distinct union intersect except lateral filter group array row cast is between
    like ilike limit offset join order partition sets cube rollup materialized numeric decimal
    varchar char character bit varbit timestamp timestamptz time timetz interval float bpchar
"""
# Words before a parenthesis that are no functions, and names of types.

_FUNCTIONS = """
    count sum avg min max bool_and bool_or every string_agg array_agg json_agg jsonb_agg
    json_object_agg jsonb_object_agg stddev variance percentile_cont percentile_disc mode
    row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value
    nth_value coalesce nullif greatest least abs ceil ceiling floor round trunc mod power sqrt exp
    ln log sign div random lower upper initcap length char_length character_length octet_length
    bit_length trim btrim ltrim rtrim lpad rpad left right substr substring position strpos
    replace reverse repeat concat concat_ws format split_part starts_with translate overlay md5
    sha256 encode decode to_hex ascii chr quote_ident quote_literal quote_nullable regexp_replace
    regexp_match regexp_matches regexp_split_to_array regexp_split_to_table now clock_timestamp
    statement_timestamp transaction_timestamp date_trunc date_part extract age make_date
    make_interval make_timestamp make_timestamptz to_char to_date to_number to_timestamp date_bin
    justify_days justify_hours justify_interval array_length array_position array_positions
    array_append array_prepend array_remove array_replace array_cat array_to_string
    string_to_array array_upper array_lower array_ndims cardinality unnest generate_series
    generate_subscripts json_build_object json_build_array jsonb_build_object jsonb_build_array
    to_json to_jsonb row_to_json json_each jsonb_each json_each_text jsonb_each_text
    json_array_elements jsonb_array_elements json_array_elements_text jsonb_array_elements_text
    json_array_length jsonb_array_length json_extract_path jsonb_extract_path
    json_extract_path_text jsonb_extract_path_text json_object_keys jsonb_object_keys json_typeof
    jsonb_typeof jsonb_set jsonb_insert jsonb_strip_nulls json_strip_nulls jsonb_pretty
    jsonb_path_query jsonb_path_exists jsonb_path_query_array jsonb_path_query_first
    jsonb_to_record jsonb_to_recordset json_to_record json_to_recordset jsonb_populate_record
    jsonb_populate_recordset to_tsvector to_tsquery plainto_tsquery phraseto_tsquery
    websearch_to_tsquery ts_rank ts_rank_cd ts_headline setweight similarity word_similarity
    gen_random_uuid pg_typeof pg_backend_pid current_database current_schema
    version txid_current_if_assigned pg_is_in_recovery isfinite lower_inc upper_inc isempty
    range_merge tstzrange tsrange daterange int4range int8range numrange host masklen family
    num_nulls num_nonnulls width_bucket pi grouping
"""
# Functions of PostgreSQL that read, and change nothing, not even for their session.

_HARMLESS = frozenset((_WORDS + _FUNCTIONS).split())


def way_of(text: str) -> Way:
    """Return the best way that the words of *text* allow."""
    if len(text) > LONGEST:
        return Way.CURSOR
    lowered = _lowered(text)
    begins = _BEFORE.match(lowered)
    first = _WORD.match(lowered, begins.end() if begins else 0)
    word = first.group() if first else ""
    # A semicolon in quotes is taken for one that parts two statements: psycopg's way does both.
    if ";" in lowered.rstrip("; \t\r\n"):
        return Way.CURSOR
    if word in _WRITES:
        return Way.ALONE
    if word not in _READS:
        return Way.CURSOR
    bare = _DOT.sub(".", _QUOTED.sub(_in_place_of, lowered))
    # Such quotes and comments would take a lexer.
    if "\\" in lowered or "$" in bare or "/*" in bare:
        return Way.ALONE
    if not _NOT_PLAIN.isdisjoint(_WORD.findall(bare)):
        return Way.ALONE
    calls = {name.removeprefix("pg_catalog.") for name in _CALL.findall(bare)}
    return Way.SHARED if calls <= _HARMLESS else Way.ALONE


def numbers_parameters(text: str) -> bool:
    """Tell whether *text* numbers its parameters; in doubt it does not."""
    return _NUMBER.search(_QUOTED.sub(_in_place_of, text)) is not None


def _lowered(text: str) -> str:
    """Return *text* as PostgreSQL folds names: a to z, and no more of Unicode."""
    return text.encode(errors="surrogatepass").lower().decode(errors="surrogatepass")


def _in_place_of(quoted: re.Match[str]) -> str:
    kind = quoted.group()[0]
    return kind if kind == '"' else "''" if kind == "'" else " "
