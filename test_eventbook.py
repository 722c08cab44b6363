"""The tests of eventbook: its contract, put to a real server on a free port.

    python -m pytest -q                  # all of them, in some 20 seconds
    python -m pytest -q -k the_story     # the assignment's nine cases

They speak a small language:

    call("PUT", path, 1, body, If_Match=tag)   user 1 updates an event, over urllib
    server.talk(octets)                        the replies to octets, over a bare socket
    server.logged()                            the bookings that the log tells of
    server.printed()                           what the console has said
    launch("-p", "0")                          the program itself, as a subprocess

and go from the plain to the cruel: the story, roles, validation, retries, lists, the
oracle, races, framing, cruelty, faults, the command line, the README. Nothing is
patched. A server in a thread must leave nothing on stderr: the fixture `quiet`.
"""

import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

import eventbook

each = pytest.mark.parametrize
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and descriptors")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own calls")

# ---- The language ------------------------------------------------------------
# A Site is a running server, in a thread or in a process, and the ways to speak to it.

HERE = os.path.dirname(os.path.abspath(__file__))
EVENT = {"title": "Tech Conference 2026", "date": "2026-02-15", "availableTickets": 3}
DENIED, UNAUTHORIZED = {"error": "Access denied"}, {"error": "Unauthorized"}
NO_EVENT, NO_BOOKING = {"error": "Event not found"}, {"error": "Booking not found"}
SOLD_OUT = {"error": "Booking failed: sold out"}
CREATING = ("POST", "/api/events", 1, EVENT)
UPDATING, READING = ("PUT", "/api/events/1", 1), ("GET", "/api/events/1", 1)
BOOKING = ("POST", "/api/events/1/book", 2)
CANCELLING = ("DELETE", "/api/bookings/1", 2)

Reply = namedtuple("Reply", "status content fields")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Site:
    def __init__(self, port, log=None):
        self.port, self.log = port, log

    def call(self, method, path, user=None, body=None, **fields):
        """The Reply to one request; fields are named like If_Match."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body, method=method)
        for name, value in {**fields, **({"user-id": user} if user else {})}.items():
            request.add_header(name.replace("_", "-"), str(value))
        try:
            return reply(opener.open(request, timeout=10))
        except urllib.error.HTTPError as error:
            return reply(error)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def talk(self, *octets, half_close=True):
        """The Replies to octets, sent piece by piece, until the server closes."""
        with self.connect() as client:
            for piece in octets[:-1]:
                client.sendall(piece)
                self.settle()
            client.sendall(octets[-1])
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_to_end(client)

    def settle(self):
        """Ask the server once, so that it has most likely read what was sent before."""
        assert self.call("GET", "/").status == 200

    def logged(self):
        """[("created" or "cancelled", booking)] as the log has them, line by line."""
        entries = [json.loads(line) for line in self.log.read_bytes().splitlines()]
        return [(one["event"].partition(".")[2], one["data"]) for one in entries]

    def printed(self):
        """All that was printed; nothing is after that."""
        self.notifier.close(5)
        return "".join(self.lines).splitlines()


def reply(response):
    with response:
        content = response.read()
    fields = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status, json.loads(content) if content else None, fields)


def read_to_end(client):
    """The Replies until the end, 100 Continue among them; content as bytes."""
    found = []
    with client.makefile("rb") as file:
        for line in iter(file.readline, b""):
            fields = http.client.parse_headers(file).items()
            fields = {name.lower(): value for name, value in fields}
            content = file.read(int(fields.get("content-length", 0)))
            version, status, _ = line.split(b" ", 2)
            found.append(Reply(int(status), content, fields))
            assert version == b"HTTP/1.1"
            check_standing_fields(found[-1])
    return found


def check_standing_fields(one):
    """What every answer with content has, the parser's own refusals included."""
    if one.status not in (100, 304):
        assert one.fields["content-type"] == "application/json; charset=utf-8"
        assert one.fields["cache-control"] == "no-store"
        assert one.fields["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", one.fields["date"])
        assert len(one.content) == int(one.fields["content-length"])
        assert one.content.endswith(b"\n") and "python" not in str(one).lower()


def short(case):
    """The id of a case in a table."""
    return ascii(case)[:60]


def statuses(found):
    return [one.status for one in found]


def answer(client, octets):
    """The Reply to octets on a connection that stays open."""
    client.sendall(octets)
    response = http.client.HTTPResponse(client)
    response.begin()
    return reply(response)


def request(method, path, *fields, user=None, body=b""):
    """The octets of a valid request."""
    fields = ["Host: a", *fields]
    fields += [f"user-id: {user}"] if user else []
    fields += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "\r\n"]).encode() + body


KEEP, EXPECT = "Connection: keep-alive", "Expect: 100-continue"
BODY = json.dumps(EVENT).encode()
GET, LIST = request("GET", "/"), request("GET", "/api/events", user=2)
CREATE = request("POST", "/api/events", user=1, body=BODY)
BOOK = request("POST", "/api/events/1/book", user=2)


def eventually(condition):
    """Ask until it holds: for what nobody tells, like a thread that has ended."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.005)


def together(number, work):
    """The results of work(0), work(1), ... in so many threads at the same moment."""
    barrier = threading.Barrier(number)
    sys.setswitchinterval(1e-6)  # they take turns as often as they can: races show
    with ThreadPoolExecutor(number, initializer=barrier.wait) as pool:
        made = list(pool.map(work, range(number)))
    sys.setswitchinterval(0.005)  # Python's default
    return made


@contextlib.contextmanager
def serving(store, log=None, **limits):
    """A Site whose server runs in a thread; no thread is left of it in the end."""
    threads = threading.active_count()
    server = type("Limited", (eventbook.Server,), limits)(("127.0.0.1", 0), store)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        site = Site(server.server_address[1], log)
        site.server = server
        yield site
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        eventually(lambda: threading.active_count() <= threads)


@contextlib.contextmanager
def whole_server(log, **limits):
    """A Site with log and console, as main() puts it together."""
    lines = []
    notifier = eventbook.Notifier(lines.append)
    notifier.start()
    with serving(eventbook.open_store(str(log), notifier), log, **limits) as site:
        site.notifier, site.lines = notifier, lines
        yield site
    notifier.close(5)


@pytest.fixture(autouse=True)
def quiet(capsys):
    """Nothing may be left on stderr; a test that expects something has read it."""
    yield
    assert capsys.readouterr().err == ""


@pytest.fixture
def server(tmp_path):
    with whole_server(tmp_path / "log") as site:
        yield site


@pytest.fixture
def call(server):
    return server.call


@pytest.fixture
def event(call):
    """Event 1, with three tickets."""
    return call(*CREATING).content


@pytest.fixture(scope="module")
def common():
    """A server for tables whose rows change nothing: event 1 is sold out, to user 2."""
    with serving(eventbook.Store()) as site:
        site.call(*CREATING[:3], {**EVENT, "availableTickets": 1})
        site.call(*BOOKING)
        yield site


# ---- The assignment's nine test cases ----------------------------------------


def test_the_story_of_the_assignment(server, call):
    assert call(*CREATING)[:2] == (201, {"id": 1, **EVENT})
    assert call("POST", "/api/events", 2)[:2] == (403, DENIED)
    assert call("GET", "/api/events", 2)[:2] == (200, [{"id": 1, **EVENT}])
    for number, customer in (1, 2), (2, 3):
        booking = {"id": number, "eventId": 1, "customerId": customer}
        told = {"message": "Booking successful", "booking": booking}
        assert call("POST", "/api/events/1/book", customer)[:2] == (201, told)
    left = {"id": 1, **EVENT, "availableTickets": 1}
    assert call(*UPDATING)[:2] == (200, {"message": "Event updated", "event": left})
    assert call(*BOOKING).status == 201
    assert call("POST", "/api/events/1/book", 3)[:2] == (400, SOLD_OUT)
    assert call("GET", "/api/events")[:2] == (401, UNAUTHORIZED)
    assert call(*CANCELLING).status == 200
    log = [(kind, booking["id"]) for kind, booking in server.logged()]
    assert log == [("created", 1), ("created", 2), ("created", 3), ("cancelled", 1)]
    assert server.printed() == [
        "📧 Booking confirmation email sent for booking 1",
        "📧 Booking confirmation email sent for booking 2",
        "🔔 Event update notification sent to customer 2",
        "🔔 Event update notification sent to customer 3",
        "📧 Booking confirmation email sent for booking 3",
    ]


def test_a_log_line_is_exactly_as_assigned(server, call, event):
    call(*BOOKING)
    line = server.log.read_text("utf-8")
    stamp = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line)[0]
    logged = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f%z")
    assert abs(logged.timestamp() - time.time()) < 60
    data = '"data":{"id":1,"eventId":1,"customerId":2}'
    assert line == f'{{"event":"booking.created","timestamp":"{stamp}",{data}}}\n'


def test_an_event_has_its_keys_in_order_and_no_spaces(server, event):
    (read,) = server.talk(request("GET", "/api/events/1", user=2))
    assert list(event) == ["id", "title", "date", "availableTickets"]
    assert read.content == (json.dumps(event, separators=(",", ":")) + "\n").encode()


def test_what_is_created_says_where_it_is(call, event):
    made, booked = call(*CREATING), call(*BOOKING)
    assert made.fields["location"] == "/api/events/2"
    assert call("GET", "/api/events/2", 1).fields["etag"] == made.fields["etag"]
    assert booked.fields["location"] == "/api/bookings/1"
    assert call("GET", "/api/bookings/1", 2).content == booked.content["booking"]


# ---- Roles and the order of checks -------------------------------------------

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
ROUTES = [
    ("POST", "/api/events", [ORGANIZER]),
    ("PUT", "/api/events/:id", [ORGANIZER]),
    ("GET", "/api/events", [CUSTOMER]),
    ("POST", "/api/events/:id/book", [CUSTOMER]),
    ("DELETE", "/api/bookings/:id", [CUSTOMER]),
    ("GET", "/api/events/:id", [ORGANIZER, CUSTOMER]),
    ("GET", "/api/events/:id/bookings", [ORGANIZER]),
    ("GET", "/api/bookings", [CUSTOMER]),
    ("GET", "/api/bookings/:id", [CUSTOMER]),
    ("GET", "/", []),
]
ROLES = {None: None, 1: ORGANIZER, 2: CUSTOMER, 3: CUSTOMER, 4: None}


@each("user", ROLES)
@each("method, path, roles", ROUTES)
def test_a_route_is_closed_to_all_but_its_roles(common, method, path, roles, user):
    status = common.call(method, path.replace(":id", "9"), user, b"!").status
    if not roles or ROLES[user] in roles:
        assert status in (200, 400, 404)
    else:
        assert status == (403 if ROLES[user] else 401)


def test_the_root_tells_these_routes(common):
    told = common.call("GET", "/").content
    listed = [(one["method"], one["path"], one["roles"]) for one in told["routes"]]
    assert (told["service"], told["version"]) == ("eventbook", eventbook.VERSION)
    assert told["routes"][8]["does"] == "Read a booking of one's own."
    assert listed == ROUTES


NO_USERS = ["", "2 2", "2\r\nUser-Id: 2", *"0 4 -2 +2 02 X2 2.0 2,2 ２ two ²".split()]


@each("user", NO_USERS)
def test_a_malformed_user_is_unauthorized(common, user):
    (refused,) = common.talk(request("GET", "/api/events", f"user-id: {user}"))
    assert (refused.status, json.loads(refused.content)) == (401, UNAUTHORIZED)
    assert refused.fields["www-authenticate"] == "user-id"


OLD, NO_KEY = {"If_Match": '"x"'}, {"Idempotency_Key": ""}
CODED = {"Transfer_Encoding": "chunked"}
ORDER = [  # most are wrong in several ways; the first in the contract's order wins
    (411, "No Transfer-Encoding is taken", "BREW", "/x", None, None, CODED),
    (413, "Content too large", "BREW", "/nowhere", None, b"[" * 100_000, {}),
    (501, "Not Implemented", "BREW", "/nowhere", None, b"!", {}),
    (404, "Not found", "PATCH", "/nowhere", None, b"!", {}),
    (405, "Method not allowed", "PATCH", "/api/events", None, b"!", {}),
    (401, "Unauthorized", "POST", "/api/events", None, b"!", {}),
    (403, "Access denied", "POST", "/api/events", 2, b"!", {}),
    (400, "Invalid JSON", "PUT", "/api/events/9", 1, b"!", OLD),
    (404, "Event not found", "PUT", "/api/events/9", 1, {"x": 1}, OLD),
    (404, "Event not found", "POST", "/api/events/9/book", 2, None, NO_KEY),
    (404, "Event not found", "GET", "/api/events/9/bookings?limit=x", 1, None, {}),
    (404, "Booking not found", "DELETE", "/api/bookings/9", 3, b"!", {}),
    (403, "Access denied", "DELETE", "/api/bookings/1", 3, b"!", {}),
    (412, "Event has changed", "PUT", "/api/events/1", 1, {"x": 1}, OLD),
    (400, "Validation failed", *BOOKING, None, NO_KEY),
    (400, "Booking failed: sold out", *BOOKING, b"!", {}),
]


@each("status, error, method, path, user, body, fields", ORDER)
def test_checks_come_in_order(common, status, error, method, path, user, body, fields):
    refused = common.call(method, path, user, body, **fields)
    assert refused.status == status
    assert refused.content["error"].startswith(error)


PATHS = (
    "/x /api /API/events /api/event /api/events/x /api/events/-1 /api/events/:id /*"
    " /api/events//1 //api/events /api/events// /api/events/1/book/2 /api/bookings/:id"
    " /api/events/1%2F /api/events/%31 /favicon.ico /api/events/" + "9" * 5000
)


@each("path", PATHS.split(), ids=short)
def test_a_path_that_is_none_is_not_found(common, path):
    assert common.call("GET", path)[:2] == (404, {"error": "Not found"})


@each("path", sorted({path for _, path, _ in ROUTES}))
def test_a_method_that_a_path_has_not_is_refused_with_those_it_has(common, path):
    """Whoever asks, and with one "/" behind; CORS's OPTIONS is no exception."""
    allowed = {method for method, other, _ in ROUTES if other == path}
    allowed |= {"HEAD"} if "GET" in allowed else set()
    path = path.replace(":id", "1").rstrip("/") + "/"
    for method in "PATCH", "OPTIONS", "TRACE", "CONNECT":
        refused = common.call(method, path)
        assert refused[:2] == (405, {"error": "Method not allowed"})
        assert set(refused.fields["allow"].split(", ")) == allowed


@each("method", "BREW get Get PROPFIND GETS X-1".split())
def test_a_method_http_does_not_know_is_not_implemented(common, method):
    assert common.call(method, "/api/events", 2).status == 501


# ---- Validation --------------------------------------------------------------

WRONG = {
    "title": ["", " \t\n", "x" * 201, 5, None, True, ["x"]],
    "availableTickets": [0, -1, 10**9 + 1, True, 3.0, 1e9, "3", None],
    "date": "|2026-02-15\n| 2026-02-15|2026-02-15 19:30|2026-02-30|2026-13-01|2026-2-15"
    "|20260215|2026-W07-7|0000-01-01|２０２６-02-15|2026-02-15T|2026-02-15T24:00|now"
    "|2026-02-15T19|2026-02-15T19:60|2026-02-15T19:30:60|2026-02-15T19:30+25:00|2026"
    "|2026-02-15t19:30|15.02.2026|2026-02-15Z|2026-02-15T19:30+0100|2025-02-29|2026-02"
    "|2026-02-15T19:30:00.|2026-02-15T19:30:00,5|2026-02-15T19:30.5|2026-046"
    "|2026-02-15T19:30:00.1234567890".split("|")
    + [None, 20260215, []],
}


@each("name, value", [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_field_is_named(common, name, value):
    """In creating and updating alike, but that an update may set the tickets to 0."""
    steps = [(*CREATING[:3], {**EVENT, name: value})]
    if value != 0:
        steps.append((*UPDATING, {name: value}))
    for step in steps:
        refused = common.call(*step)
        assert (refused.status, refused.content["error"]) == (400, "Validation failed")
        assert list(refused.content["details"]) == [name]


RIGHT = {
    "title": ["x", "x" * 200, "🎟️", '"\\/', "\u0001", "<b>"],
    "availableTickets": [1, 10**9],
    "date": "0001-01-01|9999-12-31|2024-02-29|2026-02-15T19:30|2026-02-15T00:00Z"
    "|2026-02-15T19:30:59|2026-02-15T19:30+05:30|2026-02-15T19:30:00-11:00"
    "|2026-02-15T19:30:00.000Z|2026-02-15T19:30:00.123456789+01:00".split("|"),
}


@each("name", RIGHT)
def test_a_right_field_is_kept_as_it_is(call, event, name):
    for value in RIGHT[name]:
        made = call(*CREATING[:3], {**EVENT, name: value})
        assert (made.status, made.content[name]) == (201, value)
        assert call(*UPDATING, {name: value}).status == 200
        assert call(*READING).content[name] == value


CREATED_BADLY = (*CREATING[:3], {"x": 1})
UPDATED_BADLY = (*UPDATING, {"availableTickets": -1, "id": 2, "x": 1})
LISTED_BADLY = ("GET", "/api/events?limit=0&offset=-1&available=", 2)
ADVICE = [  # what has three bad values, one of them, and what would be right
    (CREATED_BADLY, "title", "text of 1 to 200 characters, not blank"),
    (CREATED_BADLY, "date", "a real date, like 2026-02-15 or 2026-02-15T19:30"),
    (CREATED_BADLY, "availableTickets", "an integer from 1 to 1,000,000,000"),
    (UPDATED_BADLY, "availableTickets", "an integer from 0 to 1,000,000,000"),
    (UPDATED_BADLY, "id", "the id in the path"),
    (UPDATED_BADLY, "x", "no field of this name is known"),
    (LISTED_BADLY, "limit", "an integer from 1 to 1,000"),
    (LISTED_BADLY, "offset", "an integer from 0 up"),
    (LISTED_BADLY, "available", "true or false"),
]


@each("step, name, words", ADVICE)
def test_each_bad_value_is_named_with_what_would_be_right(common, step, name, words):
    refused = common.call(*step)
    assert (refused.status, refused.content["error"]) == (400, "Validation failed")
    assert refused.content["details"][name] == words
    assert len(refused.content["details"]) == 3


def test_creating_ignores_unknown_fields(call):
    made = call(*CREATING[:3], {**EVENT, "id": 7, "colour": "red"})
    assert made[:2] == (201, {"id": 1, **EVENT})


@each("name", ["colour", "Title", "id", "etag", "__class__"])
def test_updating_refuses_unknown_fields(common, name):
    """A misspelt field that is silently dropped is a lost edit; so is another's id."""
    for value in 2, True, "1":
        refused = common.call(*UPDATING, {"title": "New", name: value})
        assert (refused.status, list(refused.content["details"])) == (400, [name])
    assert common.call(*READING).content["title"] == EVENT["title"]


@each("change", [{"title": "New"}, {"date": "2027-01-01"}, {"availableTickets": 0}])
def test_an_update_changes_only_what_it_names(call, event, change):
    changed = call(*UPDATING, change).content["event"]
    assert call(*READING).content == changed == {**event, **change}
    assert call(*BOOKING).status == (201 if changed["availableTickets"] else 400)


@each("body", [None, {}])
def test_an_update_of_nothing_still_tells_each_customer_once(server, call, event, body):
    """Each with a live booking, in the order of their first."""
    call(*CREATING)
    for number, customer in (1, 2), (1, 3), (2, 2), (1, 2):
        call("POST", f"/api/events/{number}/book", customer)
    call(*UPDATING, body)
    call(*CANCELLING)
    assert call(*UPDATING, body).content["event"] == {**event, "availableTickets": 1}
    told = [line.split()[-1] for line in server.printed() if line.startswith("🔔")]
    assert told == ["2", "3", "3", "2"]


def test_cancelling_twice_frees_one_ticket(call, event):
    booking = call(*BOOKING).content["booking"]
    told = {"message": "Booking cancelled", "booking": booking}
    assert call(*CANCELLING)[:2] == (200, told)
    assert call(*CANCELLING)[:2] == (404, NO_BOOKING)
    assert call("GET", "/api/bookings/1", 2)[:2] == (404, NO_BOOKING)
    assert call(*READING).content == event
    assert call(*BOOKING).content["booking"]["id"] == 2


HOSTILE = {  # what is wrong, and contents of which this is true
    "not UTF-8, nested too deep, or an impossible number or character": [
        *[b'{"title":"\xff"}', b'{"title":"\xc0\xaf"}', b'{"title":"\xed\xa0\x80"}'],
        *[b'{"title":"\\ud800"}', b'{"\\udfff":1}', BODY.decode().encode("utf-16")],
        *[b'{"availableTickets":NaN}', b'{"x":[{"y":-Infinity}]}', b'{"x":1e400}'],
        *[b"[" * 30_000 + b"]" * 30_000, b"[" * 65_536],
        b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    "an object is wanted": [b"[" + BODY + b"]", b'"x"', b"1", b"null"],
    "Expecting value": [b" \r\n", b"X" + BODY, b"\0", b"title=x&date=2026-02-15"],
    "Expecting property name": [b"{'title':'x'}", b'{\xef\xbb\xbf"title":"x"}', b"{\0"],
    "Extra data": [BODY + b"x", BODY + BODY],
    "Invalid control character": [b'{"title":"\n"}'],
    ".*": [BODY[:-1], b'{"title":"x",}', b'{"x":' + b"9" * 5000 + b"}"],
}


BODIES = [(problem, body) for problem in HOSTILE for body in HOSTILE[problem]]


@each("problem, body", BODIES, ids=short)
def test_a_hostile_body_is_a_bad_request(common, problem, body):
    """In words for a client: none of Python's codecs, none of its advice."""
    for step in CREATING[:3], UPDATING:
        refused = common.call(*step, body)
        assert refused.status == 400
        words = f"Invalid JSON: {problem}( [a-z ]+)?(: line .* column .*)?"
        assert re.fullmatch(words, refused.content["error"])
        assert not re.search("codec|utf-8-sig|sys[.]", refused.content["error"])


def test_a_byte_order_mark_is_ignored(call, event):
    """RFC 8259, section 8.1: editors and PowerShell write one."""
    marked = "\ufeff".encode() + BODY
    assert call(*CREATING[:3], marked)[:2] == (201, {"id": 2, **EVENT})
    for body in marked, "\ufeff".encode():
        assert call(*UPDATING, body).content["event"] == event


def test_the_content_type_does_not_matter(call):
    for kind in "text/plain", "application/x-www-form-urlencoded", "":
        assert call(*CREATING, Content_Type=kind).status == 201


def test_booking_and_cancelling_ignore_a_body(call, event):
    for number, body in enumerate([None, b"!", b"[1]", b"\xff" * 60_000], start=1):
        assert call(*BOOKING, body).status == 201
        assert call("DELETE", f"/api/bookings/{number}", 2, body).status == 200


# ---- Retries and preconditions -----------------------------------------------


def test_a_retry_with_a_key_acts_once(server, call, event):
    """Nothing happens twice, not even when the booking has been cancelled since."""
    first = call(*BOOKING, Idempotency_Key="~" * 255)
    assert first.status == 201
    assert call(*BOOKING, Idempotency_Key="~" * 255)[:2] == first[:2]
    call(*CANCELLING)
    assert call(*BOOKING, Idempotency_Key="~" * 255)[:2] == first[:2]
    assert call(*READING).content == event
    assert [kind for kind, _ in server.logged()] == ["created", "cancelled"]
    assert len(server.printed()) == 1


def test_a_key_is_for_one_event_and_one_customer(call, event):
    call(*CREATING)
    assert call(*BOOKING, Idempotency_Key="k").status == 201
    refused = call("POST", "/api/events/2/book", 2, Idempotency_Key="k")
    assert refused[:2] == (422, {"error": "Key of another event"})
    theirs = call("POST", "/api/events/2/book", 3, Idempotency_Key="k")
    assert theirs.content["booking"] == {"id": 2, "eventId": 2, "customerId": 3}


def test_a_refused_booking_leaves_its_key_free(call, event):
    """And one that was made keeps it, though nothing is left."""
    for tickets, status in (0, 400), (1, 201), (0, 201):
        call(*UPDATING, {"availableTickets": tickets})
        assert call(*BOOKING, Idempotency_Key="k").status == status


@each("key", ["", "a b", "a\tb", "ä", "x" * 256])
def test_a_key_is_1_to_255_visible_characters(common, key):
    refused = common.call(*BOOKING, Idempotency_Key=key)
    details = {"Idempotency-Key": "1 to 255 visible characters"}
    assert refused.content == {"error": "Validation failed", "details": details}


def test_the_newest_ten_thousand_keys_are_remembered():
    """Of 10,001 the second is still known, the first is not; asked of the store."""
    store = eventbook.Store()
    blank = {"query": "", "fields": {}, "content": b"", "id": 1, "user": 1}
    asked = functools.partial(eventbook.Request, **blank)
    store.create(asked(content=BODY))
    store.update(asked(content=b'{"availableTickets":20000}'))
    keys = [{"idempotency-key": str(key)} for key in [*range(10_001), 1, 0]]
    made = [store.book(asked(fields=key)) for key in keys]
    assert [booking.id for booking in made] == [*range(1, 10_002), 2, 10_002]


NOTHING_LEFT, AS_IT_WAS = (*UPDATING, {"availableTickets": 0}), (*UPDATING, EVENT)
RENAMING = (*UPDATING, {"title": "New"})


def test_the_etag_changes_with_the_event_and_never_comes_back(call, event):
    """Not even with the same content, or in another run; else it stays."""
    with serving(eventbook.Store()) as another:
        tags = [another.call(*CREATING).fields["etag"]]
    for change in RENAMING, BOOKING, CANCELLING, NOTHING_LEFT, AS_IT_WAS:
        tags.append(call(*READING).fields["etag"])
        call(*CREATING)
        assert call(*UPDATING, {}).fields["etag"] == tags[-1]
        assert call(*change).status in (200, 201)
    tags.append(call(*READING).fields["etag"])
    assert len(set(tags)) == 7
    assert all(re.fullmatch(r'"[0-9a-f]{12}-\d+"', tag) for tag in tags)


PRECONDITIONS = [  # T is the current tag; what a PUT is answered, and what a GET
    ("If-Match", ["T", "*", '"old", T'], 200, 200),
    ("If-Match", ['"old"', "W/T", "w/T", 'W/T, "*"', "xT", "x T", "TT", ""], 412, 412),
    ("If-None-Match", ["T", "*", '"old",T', 'W/"old", W/T'], 412, 304),
    ("If-None-Match", ['"old"', '"*"', "xT", "w/T", ""], 200, 200),
]


@each("name, values, put, got", PRECONDITIONS)
def test_preconditions(server, call, event, name, values, put, got):
    """RFC 9110, section 13. A refusal names the current tag; nothing happens then."""
    call(*BOOKING)
    for number, value in enumerate(values):
        read, title = call(*READING), str(number)
        field = {name.replace("-", "_"): value.replace("T", read.fields["etag"])}
        for step, status in (READING, got), (("HEAD", *READING[1:]), got):
            found = call(*step, **field)
            assert (found.status, found.fields["etag"]) == (status, read.fields["etag"])
            assert ("content-length" in found.fields) == (status != 304)
        found, now = call(*UPDATING, {"title": title}, **field), call(*READING)
        assert (found.status, found.fields["etag"]) == (put, now.fields["etag"])
        assert now.content["title"] == (title if put == 200 else EVENT["title"])
    assert len(server.printed()) == 1 + len(values) * (put == 200)


def test_an_event_that_was_read_can_be_edited_and_put_back(call, event):
    read = call(*READING)
    edited = {**read.content, "title": "New"}
    put = call(*UPDATING, edited, If_Match=read.fields["etag"])
    assert put.content["event"] == edited


# ---- Lists -------------------------------------------------------------------


@pytest.fixture
def shelf(call):
    """Events 1 to 5, the even ones sold out: bookings 1 and 2 by customers 2 and 3."""
    for _ in range(5):
        call(*CREATING[:3], {**EVENT, "availableTickets": 1})
    call("POST", "/api/events/2/book", 2)
    call("POST", "/api/events/4/book", 3)


PAGES = [
    ("", [1, 2, 3, 4, 5], 5),
    ("?limit=2", [1, 2], 5),
    ("?limit=2&offset=1", [2, 3], 5),
    ("?offset=4&limit=1000", [5], 5),
    ("?offset=99", [], 5),
    ("?available=true", [1, 3, 5], 3),
    ("?available=true&limit=1&offset=1", [3], 3),
    ("?available=false", [1, 2, 3, 4, 5], 5),
    ("?sort=title&x&=&%00", [1, 2, 3, 4, 5], 5),
]


def test_a_list_comes_whole_or_in_pages(call, shelf):
    for query, ids, total in PAGES:
        listed = call("GET", f"/api/events{query}", 2)
        assert [event["id"] for event in listed.content] == ids, query
        assert listed.fields["x-total-count"] == str(total)


BAD_PAGES = (
    "limit=0 limit=1001 limit=x limit= limit=-1 limit=1.0 limit=%EF%BC%91 limit=1_0"
    " limit=%2B1 offset=-1 offset=x offset= offset=1e3 limit=" + "9" * 5000
)
BAD_AVAILABLE = "available= available=1 available=True".split()


@each("query", [*BAD_PAGES.split(), *BAD_AVAILABLE], ids=short)
def test_a_bad_page_is_refused_by_every_list(common, query):
    """And what is not "available" by that of events."""
    lists = ("/api/events", 2), ("/api/events/1/bookings", 1), ("/api/bookings", 2)
    for path, user in lists[:1] if query in BAD_AVAILABLE else lists:
        refused = common.call("GET", f"{path}?{query}", user)
        assert refused.status == 400
        assert list(refused.content["details"]) == [query.split("=")[0]]


def test_bookings_are_listed_by_event_and_by_customer(call, shelf):
    call("PUT", "/api/events/2", 1, {"availableTickets": 2})
    call("POST", "/api/events/2/book", 3)
    call("POST", "/api/events/2/book", 2)
    call(*CANCELLING)
    lists = ("/api/events/2/bookings", 1), ("/api/bookings", 2), ("/api/bookings", 3)
    ids = [[one["id"] for one in call("GET", *wanted).content] for wanted in lists]
    assert ids == [[3, 4], [4], [2, 3]]
    second = call("GET", "/api/bookings?offset=1&limit=1", 3)
    assert second.content == [{"id": 3, "eventId": 2, "customerId": 3}]
    assert second.fields["x-total-count"] == "2"


@each("path, roles", [route[1:] for route in ROUTES if route[0] == "GET"])
def test_head_is_get_without_content(common, path, roles):
    user, path = 1 if ORGANIZER in roles else 2, path.replace(":id", "1")
    got, head = common.call("GET", path, user), common.call("HEAD", path, user)
    assert (got.status, head.status, head.content) == (200, 200, None)
    assert {**head.fields, "date": ""} == {**got.fields, "date": ""}


@each("fields", ["X: y", "Content-Length: 99999", f"{EXPECT}\r\nContent-Length: 9"])
def test_head_that_is_refused_has_no_content_either(common, fields):
    """Or it would be taken for the next answer; here behind an empty line."""
    with common.connect() as client, client.makefile("rb") as file:
        client.sendall(b"\r\n" + request("HEAD", "/x", "Connection: close", fields))
        client.shutdown(socket.SHUT_WR)
        assert file.read().endswith(b"\r\n\r\n")


# ---- The oracle --------------------------------------------------------------
# A model so plain that it is seen to be right answers the same random history.


class Model:
    """Three events and their bookings in two dicts: no clients, no log, no console."""

    def __init__(self):
        self.events = {id: {"id": id, **EVENT} for id in (1, 2, 3)}
        self.bookings, self.last = {}, 0

    def book(self, id, user):
        if id not in self.events:
            return 404, NO_EVENT
        if not self.events[id]["availableTickets"]:
            return 400, SOLD_OUT
        self.events[id]["availableTickets"] -= 1
        self.last += 1
        booking = {"id": self.last, "eventId": id, "customerId": user}
        self.bookings[self.last] = booking
        return 201, {"message": "Booking successful", "booking": booking}

    def cancel(self, id, user):
        if id not in self.bookings:
            return 404, NO_BOOKING
        if self.bookings[id]["customerId"] != user:
            return 403, DENIED
        booking = self.bookings.pop(id)
        self.events[booking["eventId"]]["availableTickets"] += 1
        return 200, {"message": "Booking cancelled", "booking": booking}


def random_step(chance, last):
    """(what to do, the id of an event or of a booking, user)"""
    step, last = chance.choice([("book", 4), ("book", 4), ("cancel", last)])
    return step, chance.randint(1, last), chance.choice([2, 3])


def act(call, step, id, user):
    path = f"/api/events/{id}/book" if step == "book" else f"/api/bookings/{id}"
    return call("POST" if step == "book" else "DELETE", path, user)[:2]


@pytest.fixture
def three(call):
    """Events 1 to 3, as the model has them."""
    return [call(*CREATING) for _ in "123"]


@each("seed", range(2))
def test_a_random_history_is_answered_as_the_model_says(call, three, seed):
    chance, model = random.Random(seed), Model()
    for _ in range(200):
        step, *ids = random_step(chance, model.last + 1)
        assert act(call, step, *ids) == getattr(model, step)(*ids)
        assert call("GET", "/api/events", 2).content == list(model.events.values())


# ---- Races -------------------------------------------------------------------
# Many clients over real connections. With the store's lock taken away they all fail.


def test_a_history_of_many_clients_is_one_that_the_model_has(server, call, three):
    """The log says in which order: replayed so, the model makes the same bookings and
    ends with the same events. What was confirmed is what was logged."""
    model, confirmed = Model(), []

    def one_client(number):
        chance = random.Random(number)
        for _ in range(40):
            status, content = act(call, *random_step(chance, 60))
            confirmed.extend([content["booking"]] if status < 300 else [])

    together(12, one_client)
    for kind, booking in server.logged():
        id, event, user = booking.values()
        made = model.book(event, user) if kind == "created" else model.cancel(id, user)
        assert made[1].get("booking") == booking
    assert list(model.events.values()) == call("GET", "/api/events", 2).content
    logged = [booking for _, booking in server.logged()]
    assert sorted(map(str, confirmed)) == sorted(map(str, logged))


def test_64_threads_get_exactly_the_200_tickets_there_are(server, call, event):
    """No ticket twice, none left, and the log in the order of the ids."""
    call(*UPDATING, {"availableTickets": 200})

    def book(number):
        step = ("POST", "/api/events/1/book", 2 + number % 2)
        booked = iter(lambda: call(*step)[:2], (400, SOLD_OUT))
        return [content["booking"]["id"] for _, content in booked]

    made = [booking for mine in together(64, book) for booking in mine]
    logged = [booking["id"] for _, booking in server.logged()]
    assert sorted(made) == logged == list(range(1, 201))
    assert call(*READING).content["availableTickets"] == 0
    assert len(server.printed()) == 200


def test_of_many_who_cancel_a_booking_one_does(server, call, event):
    """And frees one ticket, of which there is one line."""
    for number in range(1, 9):
        assert call(*BOOKING).status == 201
        step = ("DELETE", f"/api/bookings/{number}", 2)
        made = together(8, lambda _, step=step: call(*step).status)
        assert sorted(made) == [200] + [404] * 7
    assert call(*READING).content == event
    assert [kind for kind, _ in server.logged()] == ["created", "cancelled"] * 8


def test_many_with_one_key_make_one_booking(server, call, event):
    for key, left in ("a", 2), ("b", 1), ("c", 0):
        made = together(16, lambda _, key=key: call(*BOOKING, Idempotency_Key=key)[:2])
        assert made == [(201, made[0][1])] * 16
        assert call(*READING).content["availableTickets"] == left
    assert [booking["id"] for _, booking in server.logged()] == [1, 2, 3]
    assert len(server.printed()) == 3


def test_of_many_with_one_etag_one_updates(call, event):
    for turn in "abcdefgh":
        tag = call(*READING).fields["etag"]

        def update(number, turn=turn, tag=tag):
            return call(*UPDATING, {"title": f"{turn} {number}"}, If_Match=tag).status

        made = together(16, update)
        assert sorted(made) == [200] + [412] * 15
        assert call(*READING).content["title"] == f"{turn} {made.index(200)}"


# ---- Framing -----------------------------------------------------------------
# Each row is refused alone, behind a valid request and in front of one. The connection
# is then closed: who cannot say where a request ends cannot say where the next begins.

LINES = {  # request lines; a Host follows
    400: "Host: a|GET|GET /|GET / |/ HTTP/1.1|GET HTTP/1.1|GET / HTTP/1.1 "
    "| GET / HTTP/1.1|GET  / HTTP/1.1|GET /  HTTP/1.1|GET\t/ HTTP/1.1|GET /\tHTTP/1.1"
    "|GET / x HTTP/1.1|GET / HTTP|GET / HTTP/|GET / HTTP/1|GET / HTTP/1.|GET / HTTP/.1"
    "|GET / HTTP/1.1.1|GET / HTTP/+1.1|GET / HTTP/01.01|GET / HTTP/1.1x|GET / HTTP/1.١"
    "|GET / http/1.1|GET / HTTP/a.b|GET / JUNK/1.1|GET / HTTP 1.1|GET / HTTP/-1.1"
    "|(GET) / HTTP/1.1|G@T / HTTP/1.1|GÄT / HTTP/1.1|GET: / HTTP/1.1|GET\0 / HTTP/1.1"
    "|GET /ä HTTP/1.1|GET /\0 HTTP/1.1|GET /\x7f HTTP/1.1|GET /\x0b HTTP/1.1|\x16\x03"
    "|GET\xa0/\xa0HTTP/1.1|GET /\nX: y HTTP/1.1|GET / HTTP/1.1\n|GET /\r HTTP/1.1|\n| "
    "|GET api/events HTTP/1.1|GET * HTTP/1.1|POST * HTTP/1.1|GET ? HTTP/1.1"
    "|GET a HTTP/1.1|CONNECT a:80 HTTP/1.1|GET http:// HTTP/1.1|GET http:/a HTTP/1.1"
    "|OPTIONS ** HTTP/1.1|GET http://u@a/ HTTP/1.1|GET http://a:b/ HTTP/1.1"
    "|GET \\ HTTP/1.1|\ufeffGET / HTTP/1.1|GET / HTTP/0.9|GET / HTTP/0.0",
    414: "GET /" + "x" * 8192 + " HTTP/1.1|" + "x" * 9000,
    505: "GET / HTTP/2.0|GET / HTTP/1.2|GET / HTTP/3.0|GET / HTTP/9.9|PRI * HTTP/2.0",
}
FIELDS = {  # field lines, behind or before a Host
    400: "X : 1|X\t: 1| X: 1|\tX: 1|X|X 1|: 1|X@Y: 1|X(Y): 1|Xä: 1|\xa0X: 1|X/Y: 1"
    '|X[:1|X,Y: 1|X;Y: 1|=: 1|{X}: 1|"X": 1|X\\: 1| |\t|X: 1\r\n |Host : a|HOST: b'
    "|X: \0|X: a\0b|X: \x01|X: \x7f|X: \x1b[31m|X: \x0b|X: \x0c|\0X: 1|X\0: 1|X: a\n b"
    "|X: a\rb|X: a\nb|X: a\nY: b|X: a\rContent-Length: 9|X: a\r|X: a\n|\rX: a|X: a\r\r"
    "|X: a\r\n b|X: a\r\n\tb|X: a\r\n  |Host: a|Host: b|HOST: a|host: a",
    431: "X: " + "x" * 16384 + "|" + "\r\n".join(["X: 1"] * 3000),
}
HOSTS = {  # all the field lines there are
    400: "|X: 1|Host:|Host: |Host: a, b|Host: a,b|Host: u@a|Host: u:p@a|Host: a/b"
    "|Host: http://a|Host: a b|Host: a:b|Host: a:80:80|Host: [::1|Host: ::1|Host: a?b"
    '|Host: a#b|Host: a\\b|Host: ä|Host: <a>|Host: a:-1|Host: [a]b|Host: "a"|Hos: a',
}
LENGTHS = {  # Content-Length, and what comes behind it
    400: '+2|-2|-0|2 2|2,2|2, 2|2_0|0x2|2.0|2e0|²|٢|２| |"2"|a|2;|;2|\xa02|2 b|2\xa0'
    "|2\r\nContent-Length: 2|2\r\nContent-Length: 3|2\r\ncontent-length: 2"
    "|2\r\nTransfer-Encoding: chunked|0\r\nTransfer-Encoding: chunked",
    413: "65537|99999999999999999999|" + "9" * 5000,
}
CODINGS = {  # Transfer-Encoding, and what comes behind it
    400: "\x0bchunked|chunked\r\nContent-Length: 2|chunked\r\n fold|chunked\x7f|x\0",
    411: "chunked|Chunked|identity|gzip|chunked, gzip|gzip, chunked|x| |chunked;q=1|,",
}
OCTETS = {  # these and nothing else
    400: "GET / HTTP/1.1\nHost: a\n\n|GET / HTTP/1.1\r\nHost: a\n\r\n"
    "|\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n|GET / HTTP/1.1\r\nHost: a\r\n\n"
    "|GET / HTTP/1.1\rHost: a\r\r\n\n|GET / HTTP/1.1\r\nHost: \xff\r\n\r\n"
    "|" + "\0" * 100 + "\n|" + "\n" * 100,
}


def rows(table, form):
    """{octets: status} for each case of a table, put into a request of some form."""
    cases = [(case, status) for status in table for case in table[status].split("|")]
    return {form.replace("...", case).encode(): status for case, status in cases}


MALFORMED = {
    **rows(LINES, "...\r\nHost: a\r\n\r\n"),
    **rows(FIELDS, "GET / HTTP/1.1\r\nHost: a\r\n...\r\n\r\n"),
    **rows(FIELDS, "GET / HTTP/1.1\r\n...\r\nHost: a\r\n\r\n"),
    **rows(HOSTS, "GET / HTTP/1.1\r\n...\r\n\r\n"),
    **rows(LENGTHS, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ...\r\n\r\n{}"),
    **rows(CODINGS, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ...\r\n\r\n{}"),
    **rows(CODINGS, "POST / HTTP/1.0\r\nTransfer-Encoding: ...\r\n\r\n{}"),
    **rows(OCTETS, "..."),
}


@each("octets, status", MALFORMED.items(), ids=short)
def test_a_malformed_request_is_refused_and_closed(common, octets, status):
    for before, behind in (b"", b""), (GET, b""), (b"", GET):
        *answered, refused = common.talk(before + octets + behind, half_close=False)
        assert statuses(answered) == [200] * bool(before)
        assert (refused.status, refused.fields["connection"]) == (status, "close")


SAID = {  # what a refusal tells a person
    b"GET /\r\n\r\n": "Malformed request line",
    b"GET / HTTP/2.0\r\n\r\n": "HTTP/1.0 and 1.1 are spoken",
    b"GET / HTTP/1.1\r\n\r\n": "Exactly one valid Host is needed",
    b"GET /" + b"x" * 8192: "Request line too long",
    b"x" * 70_000 + b"\n": "Request-URI Too Long|URI Too Long",
    request("GET", "a"): "Invalid request target",
    request("GET", "/", " X: 1"): "Malformed field line, or cut short",
    request("GET", "/", "X: " + "x" * 16384): "Header too large",
    request("GET", "/", "Content-Length: x"): "Invalid Content-Length",
    request("GET", "/", "Content-Length: 9"): "Content cut short",
    request("PUT", UPDATING[1], "If-None-Match: *", user=1): "Event has not changed",
}


@each("octets, text", SAID.items(), ids=short)
def test_a_refusal_says_what_is_wrong(common, octets, text):
    (refused,) = common.talk(octets)
    assert re.fullmatch(text, json.loads(refused.content)["error"])


def of_size(line, header):
    """A request whose request line and field lines have so many octets."""
    field = "X: " + "x" * (header - len("Host: a\r\nX: \r\n"))
    return request("GET", "/?" + "x" * (line - len("GET /? HTTP/1.1")), field)


HOSTS_TAKEN = " \t a \t | [::1]:3000| localhost:3000|a:|A-b.c~%20:65535".split("|")
TARGETS = "http://a/ HTTP://A:80/ https://a?x /?a=b?c/d&%zz http://[::1]:80"
CONVERSATIONS = {  # what is answered to these and a GET behind
    (200, 200): [
        *[b"\r\n" + of_size(8192, 99), b"GET / HTTP/1.1\r\nHost:a\r\nX: \xe4\r\n\r\n"],
        *[f"GET / HTTP/1.1\r\nHOST:{host}\r\n\r\n".encode() for host in HOSTS_TAKEN],
        *[request("GET", target) for target in TARGETS.split()],
        request("GET", "/", "X:", "X: a\tb", "!#$%&'*+-.^_`|~09azAZ: 1"),
        request("GET", "/", "Content-Length: 0000000002") + b"xx",
        request("GET", "/", KEEP, 'Connection: TE, closed, "close"'),
        request("GET", "/", "Connection:", *["X: 1"] * 2000),
        *[of_size(8192, 99), of_size(99, 16384), of_size(8192, 16384)],
        *[request("GET", "/", body=body) for body in (GET, b" " * 65536)],
    ],
    (200,): [
        *[b"GET / HTTP/1.0\r\n\r\n", request("GET", "/", KEEP, "Connection: close")],
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
        request("GET", "/", "Connection: x ,\tClose ,"),
        request("GET", "/", "Connection: close", KEEP),
    ],
    (304, 200): [request("GET", "/api/events/1", "If-None-Match: *", user=1)],
    (400, 200): [request("POST", "/api/events", user=1, body=GET)],
    (401, 200): [request("POST", "/api/events", body=GET)],
    (403, 200): [request("POST", "/api/events", user=2, body=GET)],
    (404, 200): [request("POST", "/nowhere", body=GET), request("OPTIONS", "*")],
    (405, 200): [request("PATCH", "/", body=GET)],
    (501,): [request("BREW", "/", body=GET)],
    (413,): [request("GET", "/", body=b" " * 65537)],
    (414,): [of_size(8193, 99)],
    (431,): [of_size(99, 16385)],
}
ROWS = [(octets, wanted) for wanted, row in CONVERSATIONS.items() for octets in row]


@each("octets, wanted", ROWS, ids=short)
def test_a_conversation_goes_on_or_is_closed(common, octets, wanted):
    """An answer that keeps the connection says so: timeout=15, a second less."""
    closes = len(wanted) == 1
    found = common.talk(octets + GET, half_close=not closes)
    assert statuses(found) == list(wanted)
    for one in found:
        assert one.fields.get("connection") == ("close" if closes else None)
        assert one.fields.get("keep-alive") == (None if closes else "timeout=15")


EXPECTING = EXPECT, f"Content-Length: {len(BODY)}"
INVITED = request("POST", "/api/events", *EXPECTING, user=1)
NOT_INVITED = [
    (404, request("POST", "/nowhere", *EXPECTING)),
    (405, request("PATCH", "/api/events", *EXPECTING)),
    (401, request("POST", "/api/events", *EXPECTING)),
    (403, request("POST", "/api/events", *EXPECTING, user=2)),
    (413, request("POST", "/api/events", EXPECT, "Content-Length: 65537", user=1)),
]


def test_who_expects_100_is_told_to_continue_but_not_in_http_1_0(server):
    assert statuses(server.talk(INVITED, BODY + INVITED, BODY)) == [100, 201] * 2
    assert statuses(server.talk(INVITED.replace(b"1.1", b"1.0", 1), BODY)) == [201]


@each("status, head", NOT_INVITED)
def test_who_would_be_refused_is_not_told_to_continue(common, status, head):
    assert statuses(common.talk(head, half_close=False)) == [status]


def test_no_control_character_of_a_client_is_echoed(common):
    body = json.dumps({'"\r\nSet-Cookie: x\x1b<script>': 1}).encode()
    (refused,) = common.talk(request("PUT", "/api/events/1", user=1, body=body))
    assert (refused.status, "set-cookie" in refused.fields) == (400, False)
    assert not re.search(b"[\r\x1b]|\n.", refused.content)


# ---- Cruelty -----------------------------------------------------------------

SPLIT = [(201, CREATE), (200, LIST), (400, request("GET", "/", "X : 1"))]


@each("status, octets", SPLIT, ids=short)
def test_a_request_split_anywhere_is_answered_the_same(server, status, octets):
    for at in range(1, len(octets)):
        assert statuses(server.talk(octets[:at], octets[at:])) == [status], at


def test_a_request_may_come_octet_by_octet(server):
    found = server.talk(*[CREATE[at : at + 1] for at in range(len(CREATE))])
    assert statuses(found) == [201]


def test_a_request_cut_anywhere_is_never_acted_on(server, call, event):
    for octets in CREATE, BOOK:
        for at in range(len(octets)):
            assert statuses(server.talk(octets[:at])) in ([], [400]), at
    assert call("GET", "/api/events", 2).content == [event]


def test_pipelined_requests_are_answered_in_order(server):
    reads = [request("GET", f"/api/events/{id}", user=2) for id in range(1, 51)]
    found = server.talk(CREATE * 50 + b"".join(reads))
    assert statuses(found) == [201] * 50 + [200] * 50
    assert [json.loads(one.content)["id"] for one in found] == [*range(1, 51)] * 2


def long_list(site):
    """Put so much on sale that sockets' buffers do not hold eighty lists of it."""
    body = json.dumps({**EVENT, "title": "\x01" * 200}).encode()
    site.talk(request("POST", "/api/events", user=1, body=body) * 300)


@contextlib.contextmanager
def stuck_client(site, octets=LIST * 80):
    """A client that asks for 30 MB, sees them begin, and reads nothing of it."""
    with site.connect() as client:
        client.sendall(octets)
        client.recv(1, socket.MSG_PEEK)
        yield client


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


STATES = [b"", CREATE[:20], CREATE[:-9], LIST, LIST * 80, b"\0\n", b"\0\n" * 50_000]


@each("octets", STATES, ids=short)
def test_a_client_that_vanishes_leaves_nothing_behind(server, octets):
    """Ten reset their connections; then none is open, and all threads are free."""
    long_list(server)
    for _ in range(10):
        client = server.connect()
        client.sendall(octets)
        server.settle()
        reset(client)
    eventually(lambda: not server.server.deadlines)


@pytest.fixture
def hasty(tmp_path):
    """A server whose patience is short."""
    with whole_server(tmp_path / "log", patience=0.2) as site:
        yield site


def test_a_client_that_never_reads_is_closed_and_holds_up_nobody(hasty):
    long_list(hasty)
    with stuck_client(hasty):
        assert hasty.call("GET", "/api/events", 2).status == 200
        eventually(lambda: not hasty.server.deadlines)


@each("octets", [CREATE, b"\0\n"], ids=["asking", "refused"])
def test_a_client_that_drips_is_closed_at_the_deadline(hasty, octets):
    """However regularly octets come, the whole request has one deadline."""
    end = time.monotonic() + 3
    with hasty.connect() as client, pytest.raises(OSError):
        client.settimeout(0.01)
        for octet in itertools.cycle(octets):
            assert time.monotonic() < end
            client.sendall(bytes([octet]))
            with contextlib.suppress(socket.timeout):
                client.recv(99_999)
    assert hasty.call("GET", "/api/events", 2).content == []


@each("octets, expected", [(b"", []), (CREATE[:-1], []), (GET, [200])])
def test_an_idle_client_is_closed(hasty, octets, expected):
    """No sooner than its time is over, and half a request is not answered."""
    begun = time.monotonic()
    with hasty.connect() as client:
        client.sendall(octets)
        assert statuses(read_to_end(client)) == expected
        assert time.monotonic() - begun > 0.15


def test_a_request_that_takes_long_is_no_idle_client():
    """Its client waits for the server, not the server for its client."""
    store, pause = eventbook.Store(), threading.Event()
    store.on("event.updated", lambda *_: pause.wait(0.3))
    with serving(store, patience=0.1) as site:
        site.call(*CREATING)
        assert site.call(*UPDATING).status == 200


def test_each_open_connection_has_a_thread(server):
    with contextlib.ExitStack() as stack:
        before = threading.active_count()
        for _ in range(40):
            stack.enter_context(server.connect())
        server.settle()
        assert threading.active_count() - before >= 40


@pytest.fixture
def small(tmp_path):
    """A server with room for two."""
    with whole_server(tmp_path / "log", connection_limit=2) as site:
        yield site


def test_who_has_waited_longest_makes_room(small):
    """The first to come has spoken since; so it is the second that is closed."""
    with small.connect() as first, small.connect() as second:
        for client in first, second, first:
            assert answer(client, GET).status == 200
        with small.connect() as third:
            assert second.recv(1) == b""
            assert statuses(answer(one, GET) for one in (third, first)) == [200, 200]


def test_slow_clients_shut_nobody_out(small):
    """However many there are, and though none of them is overdue."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(small.connect()).sendall(CREATE[:20])
        for _ in range(10):
            small.settle()


@each("octets", [request("GET", "/", "X : 1"), request("BREW", "/"), b"\n"])
def test_a_refusal_can_be_read_by_a_client_that_still_sends(server, octets):
    """Closing with unread input would reset the connection and take the answer back."""
    (refused,) = server.talk(octets, *[b"x" * 99_999] * 9)
    assert refused.status in (400, 501)


# ---- Faults ------------------------------------------------------------------

DEFECTS = {"booking.created": BOOKING, "booking.cancelled": CANCELLING}
DEFECTS["event.updated"] = RENAMING


@each("name, step", DEFECTS.items())
def test_a_defect_of_ours_changes_nothing(capsys, name, step):
    """500 for the client, a traceback for stderr; who hears of it later, does not."""
    faulty, told, store = [True], [], eventbook.Store()
    with serving(store) as site:
        for change in CREATING, BOOKING:
            site.call(*change)
        store.on(name, lambda *_: faulty and 1 / 0, lambda *_: told.append(name))
        views = READING, ("GET", "/api/events/1/bookings", 1)
        before = [site.call(*view).content for view in views]
        assert site.call(*step)[:2] == (500, {"error": "Internal server error"})
        assert [site.call(*view).content for view in views] == before
        eventually(lambda: not site.server.deadlines)
        assert (told, capsys.readouterr().err.count("ZeroDivisionError")) == ([], 1)
        faulty.clear()
        assert (site.call(*step).status < 300, told) == (True, [name])


def test_a_defect_is_told_though_its_client_has_gone(capsys):
    store, gone = eventbook.Store(), threading.Event()
    store.on("event.updated", lambda *_: gone.wait(5) and 1 / 0)
    with serving(store) as site:
        site.call(*CREATING)
        client = site.connect()
        client.sendall(request(*UPDATING[:2], user=1))
        site.settle()
        reset(client)
        gone.set()
        (refused,) = site.talk(request(*UPDATING[:2], user=1) + GET)
        assert (refused.status, refused.fields["connection"]) == (500, "close")
        eventually(lambda: not site.server.deadlines)
    assert capsys.readouterr().err.count("ZeroDivisionError") == 2


@posix
def test_what_has_arrived_when_it_is_stopped_is_answered():
    """Of those that stand in the queue, and all of it; the idle are dropped."""
    with contextlib.ExitStack() as stack:
        with serving(eventbook.Store()) as site:
            idle = stack.enter_context(site.connect())
            assert answer(idle, GET).status == 200
            site.server.shutdown()
            clients = [stack.enter_context(site.connect()) for _ in range(99)]
            for client in clients:
                client.sendall(GET * 3)
        assert idle.recv(1) == b""
        for client in clients:
            assert statuses(read_to_end(client)) == [200] * 3


def test_idle_and_stuck_clients_do_not_hold_up_the_end(tmp_path):
    """Some send nothing, some half a request, and some take nothing."""
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        with whole_server(tmp_path / "log", grace=0.2) as site:
            long_list(site)
            for octets in [b"", CREATE[:-2], LIST * 80] * 30:
                stack.enter_context(site.connect()).sendall(octets)
            site.settle()
        assert time.monotonic() < begun + 5


@linux
def test_a_full_disk_leaves_whole_lines_until_there_is_room_again(program):
    """A limit on the size of files cuts a booking's line, and a cancellation's."""
    import resource

    program.call(*CREATING)
    assert [program.call(*BOOKING).status for _ in "12"] == [201, 201]
    held, endless = program.log.read_bytes(), resource.RLIM_INFINITY
    for limit, status in (len(held) + 40, 503), (endless, 201):
        limits = resource.RLIMIT_FSIZE, (limit, endless)
        resource.prlimit(program.process.pid, *limits)
        assert program.log.read_bytes() == held
        assert program.call(*BOOKING).status == status
        assert program.call(*CANCELLING).status == (503 if status == 503 else 200)
    assert [booking["id"] for _, booking in program.logged()] == [1, 2, 3, 1]


@posix
def test_kill_9_loses_no_confirmed_booking(program):
    """Eight book until the process is gone; what they were told of is in the log."""
    program.call(*CREATING[:3], {**EVENT, "availableTickets": 10**6})
    confirmed = []

    def book(_):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                confirmed.append(program.call(*BOOKING).content["booking"])
                if len(confirmed) >= 200:
                    program.process.kill()

    together(8, book)
    whole = program.log.read_bytes().rpartition(b"\n")[0].splitlines()
    logged = [json.loads(line)["data"] for line in whole]
    assert [data["id"] for data in logged] == list(range(1, len(logged) + 1))
    assert all(booking in logged for booking in confirmed)


@each("held", [b"", b"{}\n", b'{}\n{"event":"boo'])
def test_a_half_line_is_ended_and_whole_ones_are_kept(tmp_path, held):
    """A restart begins at id 1, and the log goes on."""
    (tmp_path / "log").write_bytes(held)
    for _ in "12":
        with whole_server(tmp_path / "log") as site:
            assert site.call(*CREATING).content["id"] == 1
            assert site.call(*BOOKING).content["booking"]["id"] == 1
    *kept, first, second, rest = site.log.read_bytes().split(b"\n")
    assert (kept, rest) == (held.splitlines(), b"")
    assert json.loads(first)["data"] == json.loads(second)["data"]


MOVES = {  # what is done to the log, and how many lines come before the next two
    "renamed": (lambda log: log.rename(f"{log}.1"), 0),
    "removed": (os.remove, 0),
    "truncated": (lambda log: os.truncate(log, 0), 0),
    "cut in a line": (lambda log: os.truncate(log, log.stat().st_size - 5), 1),
    "appended to": (lambda log: log.write_text(log.read_text() + "x"), 2),
}


@each("move, lines", MOVES.values(), ids=MOVES)
def test_the_log_is_at_its_path(server, call, event, move, lines):
    """Whatever is done to the file, the next line is there, and a line of its own."""
    call(*BOOKING)
    move(server.log)
    assert [call(*BOOKING).status for _ in "12"] == [201, 201]
    *left, second, third, rest = server.log.read_bytes().split(b"\n")
    assert [json.loads(line)["data"]["id"] for line in (second, third)] == [2, 3]
    assert (len(left), rest) == (lines, b"")


def test_without_its_folder_a_booking_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    with whole_server(tmp_path / "logs" / "log") as site:
        event = site.call(*CREATING).content
        shutil.rmtree(tmp_path / "logs")
        refused = site.call(*BOOKING, Idempotency_Key="k")
        assert refused[:2] == (503, {"error": "The log cannot be written"})
        assert int(refused.fields["retry-after"]) > 0
        assert site.call(*READING).content == event
        assert site.call("GET", "/api/bookings", 2).content == []
        (tmp_path / "logs").mkdir()
        assert site.call(*BOOKING, Idempotency_Key="k").status == 201
        assert len(site.printed()) == 1


# ---- The command line --------------------------------------------------------

PROGRAM = os.path.join(HERE, "eventbook.py")
ENVIRONMENT = {**os.environ, "PORT": "", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def launch(tmp_path):
    """launch(*options) starts the program; whatever still runs in the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(*options, program=PROGRAM, shell=(), flags=(), **environment):
            how = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
            how.update(env={**ENVIRONMENT, **environment}, encoding="utf-8")
            command = [*shell, sys.executable, *flags, program, *options]
            process = subprocess.Popen(command, cwd=tmp_path, **how)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def site_of(process, log=None):
    """The Site that a program's first line tells of."""
    site = Site(int(process.stdout.readline().rsplit(":", 1)[1]), log)
    site.process = process
    return site


@pytest.fixture
def program(launch, tmp_path):
    """The program on a free port."""
    log = tmp_path / "log"
    return site_of(launch("-p", "0", "--log", str(log)), log)


def outcome(process, timeout=5):
    """(exit status, stdout, stderr)"""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


HOSTS_SHOWN = {"127.0.0.1": "localhost", "": "localhost", "::1": "[::1]"}
HOSTS_SHOWN["0.0.0.0"] = "0.0.0.0"


@each("host, shown", HOSTS_SHOWN.items())
def test_the_start_line_holds_the_real_url(launch, host, shown):
    if host == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    line = launch("--host", host, "-p", "0", "--log", "log").stdout.readline()
    found = re.fullmatch(r"eventbook listens on (http://(\S*):\d+)\n", line)
    assert (found[2], opener.open(found[1], timeout=5).status) == (shown, 200)


def has_ipv6():
    where = {"address": ("::1", 0), "family": socket.AF_INET6}
    with contextlib.suppress(OSError), socket.create_server(**where):
        return True


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@posix
def test_port_is_where_it_listens_and_free_again_at_once(launch):
    """Although a connection that the server closed first lingers in TIME_WAIT."""
    port = free_port()
    for _ in "12":
        site = site_of(launch("--log", "log", PORT=port))
        assert site.port == int(port)
        site.talk(request("GET", "/", "Connection: close"), half_close=False)
        site.process.terminate()
        assert outcome(site.process) == (0, "", "")


@each("port", ["7", "x"])
def test_the_option_wins_over_the_variable_port(launch, port):
    """So much that a wrong one does not matter then."""
    assert str(site_of(launch("-p", "0", "--log", "log", PORT=port)).port) != port


NO_PORT = "is no port from 0 to 65535\n"
ENDS = [  # options, PORT, exit status, what is in the last line of stderr
    ("--no-such-option", "", 2, "unrecognized arguments: --no-such-option\n"),
    ("-p", "", 2, "argument -p/--port: expected one argument\n"),
    *[(f"-p {bad}", "", 2, f"{bad!r} {NO_PORT}") for bad in "x 65536 1_0".split()],
    *[("", bad, 2, f"{bad!r} {NO_PORT}") for bad in ("-1", "٣")],
    ("-p {port}", "", 1, "cannot listen on 127.0.0.1:{port}; try another --port or"),
    ("--log .", "", 1, "eventbook: cannot write .; name another file with --log ("),
    ("--log no/log", "", 1, "eventbook: cannot write no/log; name another file with"),
    ("--host no.invalid", "", 1, "eventbook: cannot listen on no.invalid:0; try"),
    ("--host a..b", "", 1, "cannot listen on a..b:0; try another --port or --host ("),
    ("--host " + "é" * 64, "", 1, "eventbook: cannot listen on éééé"),
]


@each("options, port, status, last", ENDS, ids=short)
def test_wrong_use_and_trouble_end_it(launch, common, options, port, status, last):
    """With usage and 2; with one line that says what to do, and 1."""
    options = options.format(port=common.port).split()
    process = launch("--log", "log", *["-p", "0"] * (status == 1), *options, PORT=port)
    *usage, line = outcome(process, timeout=20)[2].splitlines()
    assert (process.returncode, bool(usage)) == (status, status == 2)
    assert line.endswith(")") == (status == 1)
    assert last.format(port=common.port) in f"{line}\n"


@posix
def test_a_pipe_is_no_log(launch, tmp_path):
    """Or the start would wait for somebody to read it."""
    os.mkfifo(tmp_path / "pipe")
    status, stdout, stderr = outcome(launch("-p", "0", "--log", "pipe"))
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("eventbook: cannot write pipe; name another file")


USERS = "1  ORGANIZER", "2  CUSTOMER", "3  CUSTOMER"


def test_help_and_version(launch):
    status, stdout, stderr = outcome(launch("--help", COLUMNS="999"))
    assert (status, stderr) == (0, "")
    assert "\n\neventbook: an event booking backend over HTTP\n\n" in stdout
    port = "where to listen, 0 for any free port (default: $PORT, or else 3000)"
    log = os.path.join(HERE, "logs", "events.log.jsonl")
    words = (
        f" {port} --host HOST default: 127.0.0.1 --log FILE default: {log} --version "
    )
    assert words in " ".join(stdout.split())
    users = "".join(f"  user-id: {user}\n" for user in USERS)
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    assert stdout.endswith(f"\n\nusers:\n{users}\nexample:\n{example}\n")
    assert outcome(launch("-p", "65535", "--version")) == (0, "eventbook 1.0.0\n", "")


def test_the_log_is_beside_the_program_by_default(launch, tmp_path):
    """Wherever it is started: here a copy of it alone, from another folder."""
    (tmp_path / "home").mkdir()
    program = shutil.copy(PROGRAM, tmp_path / "home")
    for lines in 1, 2:
        log = tmp_path / "home" / "logs" / "events.log.jsonl"
        site = site_of(launch("-p", "0", program=program), log)
        assert [site.call(*step).status for step in (CREATING, BOOKING)] == [201, 201]
        assert len(site.logged()) == lines


@linux
def test_it_keeps_to_one_processor_of_those_it_may_use(program):
    (kept,) = os.sched_getaffinity(program.process.pid)
    assert kept in os.sched_getaffinity(0)


@posix
@each("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_it_when_what_has_arrived_is_answered(launch, tmp_path, name):
    """Whoever reads late is not cut off, the idle are, what is queued is printed, and
    nothing is left open that Python would warn of."""
    if name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("it is ignored here, as under nohup")
    strict, log = ("-X", "dev", "-W", "error"), str(tmp_path / "log")
    program = site_of(launch("-p", "0", "--log", log, flags=strict))
    long_list(program)
    with program.connect() as idle, stuck_client(program, LIST * 80 + BOOK) as late:
        program.settle()
        program.process.send_signal(getattr(signal, name))
        assert read_to_end(idle) == []
        with pytest.raises(OSError):
            program.connect()
        assert statuses(read_to_end(late)) == [200] * 80 + [201]
    printed = "📧 Booking confirmation email sent for booking 1\n"
    assert outcome(program.process) == (0, printed, "")


@posix
def test_a_hang_up_that_was_ignored_at_the_start_is_ignored(launch):
    """As under nohup: the terminal may go."""
    nohup = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    site = site_of(launch("-p", "0", "--log", "log", shell=nohup))
    site.process.send_signal(signal.SIGHUP)
    for _ in range(100):  # longer than it would take to stop
        site.settle()
    site.process.terminate()
    assert outcome(site.process) == (0, "", "")


@posix
def test_a_second_ctrl_c_ends_it_at_once(program):
    long_list(program)
    with stuck_client(program), program.connect() as idle:
        program.settle()
        program.process.send_signal(signal.SIGINT)
        assert read_to_end(idle) == []
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(1) != 0


CLOSED = ("sh", "-c", 'exec "$@" >&-', "sh")  # without a stdout
CONSOLES = {"closed": {"shell": CLOSED}, "broken": {}}
CONSOLES["without emoji"] = {"PYTHONIOENCODING": "ascii"}


@posix
@each("console", CONSOLES)
def test_a_console_of_any_kind_harms_nothing(launch, console):
    process = launch("-p", port := free_port(), "--log", "log", **CONSOLES[console])
    site = Site(int(port))
    eventually(lambda: accepts_connections(site))
    if console == "broken":
        process.stdout.close()
    assert statuses(site.talk(CREATE + BOOK * 3)) == [201] * 4
    process.terminate()
    if console == "without emoji":
        printed = process.stdout.read()
        assert " Booking confirmation email sent for booking 3\n" in printed
    assert (process.wait(5), process.stderr.read()) == (0, "")


def accepts_connections(site):
    with contextlib.suppress(OSError), site.connect():
        return True


@posix
@each("reads", [True, False])
def test_what_is_queued_in_the_end_is_printed_if_it_is_read(program, reads):
    """4,000 lines, of which the pipe holds a third; it waits for them, not for ever."""
    program.call(*CREATING[:3], {**EVENT, "availableTickets": 5000})
    assert statuses(program.talk(BOOK * 4000)) == [201] * 4000
    program.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.2)
    printed = program.process.stdout.read() if reads else ""
    assert (program.process.wait(4), printed.count("📧")) == (0, 4000 * reads)


# ---- The README --------------------------------------------------------------
# What its session, its routes and its limits claim, something runs.


def readme(pattern):
    """All that a pattern finds in the README."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return re.findall(pattern, file.read(), re.MULTILINE)


@posix
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_session_in_the_readme_is_what_happens(program):
    steps = readme(r"^\$ (curl .*)\n((?:[^$`].*\n)*)")
    assert len(steps) >= 5
    for command, shown in steps:
        command = command.replace("localhost:3000", f"127.0.0.1:{program.port}")
        output = subprocess.check_output(["sh", "-c", f"{command} 2>/dev/null"])
        assert output.decode() == shown, command
    program.process.terminate()
    assert outcome(program.process) == (0, *readme(r"^```text\n((?:[^`].*\n)*)"), "")


def test_the_routes_in_the_readme_match_the_code():
    shown = readme(r"^\| `([A-Z]+) (\S+)` \| (.*) \| (.*) \|$")
    for route, (method, path, roles, does) in zip(eventbook.ROUTES, shown):
        assert (method, path, does) == (*route[:2], route.does.__doc__)
        assert roles == (", ".join(route.roles) or "anyone")
    assert len(shown) == len(eventbook.ROUTES)


def test_the_limits_in_the_readme_match_the_code():
    sizes = eventbook.LINE_LIMIT, eventbook.HEADER_LIMIT, eventbook.CONTENT_LIMIT
    assert sizes == (8192, 16384, 65536)
    server = eventbook.Server
    assert (server.patience, server.grace, server.connection_limit) == (16, 2, 512)
    for figure in "8 KiB|16 KiB|64 KiB|16 s|2 s|512".split("|"):
        assert readme(rf"\b{figure}\b"), figure
