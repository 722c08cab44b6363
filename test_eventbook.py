"""The tests of eventbook: its contract, put to a real server on a free port.

    python -m pytest -q                  # all of them, in some 20 seconds
    python -m pytest -q -k the_story     # the assignment's nine cases

They speak a small language:

    call("POST", "/api/events", 1, EVENT)    user 1 creates an event, over urllib
    call("PUT", path, 1, {}, If_Match=tag)   with a header field
    server.talk(octets)                      the replies to octets, over a bare socket
    server.entries()                         what the log says
    server.printed()                         what the console has said
    launch("-p", "0")                        the program itself, as a subprocess

and go from the plain to the cruel: the story, roles, validation, retries, lists, the
oracle, races, framing, cruelty, faults, the command line, the README. Nothing is
patched. A server in a thread must leave nothing on stderr: the fixture `quiet`.
"""

import contextlib
import http.client
import inspect
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

import eventbook

try:
    import resource
except ImportError:  # Windows
    resource = None

pytestmark = pytest.mark.filterwarnings(
    "error::pytest.PytestUnhandledThreadExceptionWarning"
)
each = pytest.mark.parametrize
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and descriptors")
linux = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's prlimit")

# ---- The language ------------------------------------------------------------
# A Site is a running server, in a thread or in a process, and the ways to speak to it.

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "eventbook.py")
EVENT = {"title": "Tech Conference 2026", "date": "2026-02-15", "availableTickets": 3}
DENIED, UNAUTHORIZED = {"error": "Access denied"}, {"error": "Unauthorized"}
NO_EVENT, NO_BOOKING = {"error": "Event not found"}, {"error": "Booking not found"}
SOLD_OUT = {"error": "Booking failed: sold out"}

Reply = namedtuple("Reply", "status content fields")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Site:
    def __init__(self, port, log=None, notifier=None, lines=()):
        self.port, self.log, self.notifier, self.lines = port, log, notifier, lines

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
                self.pause()
            client.sendall(octets[-1])
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_to_end(client)

    def pause(self):
        """Ask the server once, so that it has most likely read what was sent before."""
        assert self.call("GET", "/").status == 200

    def entries(self):
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

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
            found.append(Reply(int(line.split()[1]), content, fields))
    return found


def statuses(found):
    return [one.status for one in found]


def answer(client):
    """The next Reply on a connection that stays open."""
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
GET = request("GET", "/")
LIST = request("GET", "/api/events", user=2)
CREATE = request("POST", "/api/events", user=1, body=BODY)
BOOK = request("POST", "/api/events/1/book", user=2)


def eventually(condition):
    """Ask until it holds: for what nobody tells, like a thread that has ended."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.005)


def let_pass(seconds):
    """For what must not happen meanwhile, or must be late by then."""
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end)


def together(number, work):
    """The results of work(0), work(1), ... in so many threads at the same moment."""
    barrier = threading.Barrier(number)
    with ThreadPoolExecutor(number, initializer=barrier.wait, initargs=(10,)) as pool:
        return list(pool.map(work, range(number)))


@contextlib.contextmanager
def serving(store, server_class=eventbook.Server, poll=0.01, **more):
    """A Site whose server runs in a thread."""
    server = server_class(("127.0.0.1", 0), store)
    thread = threading.Thread(target=server.serve_forever, args=(poll,))
    thread.start()
    try:
        site = Site(server.server_address[1], **more)
        site.server = server
        yield site
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        assert not thread.is_alive()


@contextlib.contextmanager
def whole_server(log, server_class=eventbook.Server):
    """A Site with log and console, as main() puts it together."""
    lines = []
    notifier = eventbook.Notifier(lines.append)
    notifier.start()
    store = eventbook.open_store(str(log), notifier)
    with serving(store, server_class, log=log, notifier=notifier, lines=lines) as site:
        yield site
    notifier.close(5)


def on_sale(tickets):
    """(Store, Request): a store with one event, and what customer 2 books it with."""
    content = json.dumps({**EVENT, "availableTickets": tickets}).encode()
    store, ask = eventbook.Store(), eventbook.Request("", "", {}, content, id=1, user=2)
    store.create(ask)
    return store, ask


def slow_store(seconds):
    """A Store in which an update takes so long."""
    store, pause = eventbook.Store(), threading.Event()
    store.on("event.updated", lambda *_: pause.wait(seconds))
    return store


@contextlib.contextmanager
def held_up(server_class=eventbook.Server):
    """(Site, hold, go_on): hold(client) lets the server work for that one, and for
    nobody else, until go_on.set()."""
    held, go_on, store = threading.Event(), threading.Event(), eventbook.Store()
    store.on("event.updated", lambda *_: held.set() or go_on.wait(10))

    def hold(client, behind=b""):
        client.sendall(request("PUT", "/api/events/1", user=1) + behind)
        assert held.wait(10)

    with serving(store, server_class) as site:
        site.call("POST", "/api/events", 1, EVENT)
        yield site, hold, go_on


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
    return call("POST", "/api/events", 1, EVENT).content


@pytest.fixture(scope="module")
def common():
    """A server for tables whose rows change nothing: event 1 is sold out, to user 2."""
    with serving(eventbook.Store()) as site:
        site.call("POST", "/api/events", 1, {**EVENT, "availableTickets": 1})
        site.call("POST", "/api/events/1/book", 2)
        yield site


# ---- The assignment's nine test cases ----------------------------------------


def test_the_story_of_the_assignment(server, call):
    assert call("POST", "/api/events", 1, EVENT)[:2] == (201, {"id": 1, **EVENT})
    assert call("POST", "/api/events", 2)[:2] == (403, DENIED)
    assert call("GET", "/api/events", 2)[:2] == (200, [{"id": 1, **EVENT}])
    for number, customer in (1, 2), (2, 3):
        booking = {"id": number, "eventId": 1, "customerId": customer}
        told = {"message": "Booking successful", "booking": booking}
        assert call("POST", "/api/events/1/book", customer)[:2] == (201, told)
    left = {"id": 1, **EVENT, "availableTickets": 1}
    told = {"message": "Event updated", "event": left}
    assert call("PUT", "/api/events/1", 1)[:2] == (200, told)
    assert call("POST", "/api/events/1/book", 2).status == 201
    assert call("POST", "/api/events/1/book", 3)[:2] == (400, SOLD_OUT)
    assert call("GET", "/api/events")[:2] == (401, UNAUTHORIZED)
    assert call("DELETE", "/api/bookings/1", 2).status == 200
    log = [(entry["event"][8:], entry["data"]["id"]) for entry in server.entries()]
    assert log == [("created", 1), ("created", 2), ("created", 3), ("cancelled", 1)]
    assert server.printed() == [
        "📧 Booking confirmation email sent for booking 1",
        "📧 Booking confirmation email sent for booking 2",
        "🔔 Event update notification sent to customer 2",
        "🔔 Event update notification sent to customer 3",
        "📧 Booking confirmation email sent for booking 3",
    ]


def test_a_log_line_is_exactly_as_assigned(server, call, event):
    call("POST", "/api/events/1/book", 2)
    line = server.log.read_text("utf-8")
    stamp = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line)[0]
    data = '"data":{"id":1,"eventId":1,"customerId":2}'
    assert line == f'{{"event":"booking.created","timestamp":"{stamp}",{data}}}\n'


def test_an_event_has_its_keys_in_order_and_no_spaces(server, event):
    (read,) = server.talk(request("GET", "/api/events/1", user=2))
    assert list(event) == ["id", "title", "date", "availableTickets"]
    assert read.content == (json.dumps(event, separators=(",", ":")) + "\n").encode()


def test_what_is_created_says_where_it_is(call, event):
    made, booked = call("POST", "/api/events", 1, EVENT), call(*BOOKING)
    assert made.fields["location"] == "/api/events/2"
    assert call("GET", "/api/events/2", 1).fields["etag"] == made.fields["etag"]
    assert booked.fields["location"] == "/api/bookings/1"
    assert call("GET", "/api/bookings/1", 2).content == booked.content["booking"]


# ---- Roles and the order of checks -------------------------------------------

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
BOOKING = ("POST", "/api/events/1/book", 2)
CANCELLING = ("DELETE", "/api/bookings/1", 2)
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
def test_roles(common, method, path, roles, user):
    """Closed to nobody, to strangers and to the other role, and to them alone."""
    status = common.call(method, path.replace(":id", "9"), user, b"!").status
    if not roles or ROLES[user] in roles:
        assert status in (200, 400, 404)
    else:
        assert status == (403 if ROLES[user] else 401)


def test_the_code_and_the_root_tell_these_routes(common):
    told = common.call("GET", "/").content
    listed = [(one["method"], one["path"], one["roles"]) for one in told["routes"]]
    assert (told["service"], told["version"]) == ("eventbook", eventbook.VERSION)
    assert told["routes"][8]["does"] == "Read a booking of one's own."
    assert listed == [(*one[:2], list(one.roles)) for one in eventbook.ROUTES] == ROUTES


NO_USERS = ["", "2 2", "2\r\nUser-Id: 2", *"0 4 -2 +2 02 X2 2.0 2,2 ２ two ²".split()]


@each("user", NO_USERS)
def test_a_malformed_user_is_unauthorized(common, user):
    (refused,) = common.talk(request("GET", "/api/events", f"user-id: {user}"))
    assert (refused.status, json.loads(refused.content)) == (401, UNAUTHORIZED)
    assert refused.fields["www-authenticate"] == "user-id"


OLD, NO_KEY = {"If_Match": '"x"'}, {"Idempotency_Key": ""}
ORDER = [  # most are wrong in several ways; the first in the contract's order wins
    (411, "", "BREW", "/nowhere", None, None, {"Transfer_Encoding": "x"}),
    (413, "", "BREW", "/nowhere", None, b"[" * 100_000, {}),
    (404, "Not found", "BREW", "/nowhere", None, None, {}),
    (501, "", "BREW", "/api/events", None, b"!", {}),
    (405, "", "PATCH", "/api/events", None, b"!", {}),
    (401, "Unauthorized", "POST", "/api/events", None, b"!", {}),
    (403, "Access denied", "POST", "/api/events", 2, b"!", {}),
    (403, "Access denied", "POST", "/api/events/9/book", 1, None, NO_KEY),
    (400, "Invalid JSON", "PUT", "/api/events/9", 1, b"!", OLD),
    (404, "Event not found", "PUT", "/api/events/9", 1, {"x": 1}, OLD),
    (404, "Event not found", "POST", "/api/events/9/book", 2, None, NO_KEY),
    (404, "Event not found", "GET", "/api/events/9/bookings?limit=x", 1, None, {}),
    (404, "Booking not found", "DELETE", "/api/bookings/9", 3, b"!", {}),
    (403, "Access denied", "DELETE", "/api/bookings/1", 3, b"!", {}),
    (403, "Access denied", "GET", "/api/bookings/1", 3, None, {}),
    (412, "", "PUT", "/api/events/1", 1, {"x": 1}, OLD),
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


@each("path", PATHS.split(), ids=lambda path: path[:24])
def test_a_path_that_is_none_is_not_found_by_anybody(common, path):
    assert common.call("GET", path)[:2] == (404, {"error": "Not found"})


@each("path", sorted({path for _, path, _ in ROUTES}))
def test_options_and_405_say_what_a_path_allows(common, path):
    """Also with one "/" behind, and of nobody; 204 has no Content-Length or -Type."""
    methods = {method for method, other, _ in ROUTES if other == path} | {"OPTIONS"}
    methods |= {"HEAD"} & {"HEAD" if method == "GET" else "" for method in methods}
    path = path.replace(":id", "1").rstrip("/") + "/"
    told, refused = common.call("OPTIONS", path), common.call("PATCH", path, 1)
    assert (told.status, told.content, refused.status) == (204, None, 405)
    assert not {"content-length", "content-type"} & set(told.fields)
    for allowed in told.fields["allow"], refused.fields["allow"]:
        assert set(allowed.split(", ")) == methods


@each("method", "BREW get Get PROPFIND GETS X-1".split())
def test_a_method_http_does_not_know_is_not_implemented(common, method):
    assert common.call(method, "/api/events", 2).status == 501


# ---- Validation --------------------------------------------------------------

WRONG = {
    "title": ["", " \t\n", "x" * 201, 5, None, True, ["x"]],
    "availableTickets": [0, -1, 10**9 + 1, True, 3.0, 1e9, "3", None],
    "date": [None, 20260215, [], "", " 2026-02-15", "2026-02-15\n", "2026-02-15 19:30"]
    + "2026-02-30 2026-13-01 2026-2-15 20260215 2026-W07-7 0000-01-01".split()
    + "２０２６-02-15 2026-02-15T 2026-02-15T24:00 2026-02-15T19 2026-02-15T19:60".split()
    + "2026-02-15T19:30:60 2026-02-15T19:30+25:00 2026-02-15t19:30 2026-046".split()
    + "15.02.2026 tomorrow 2026-02-15Z 2026-02-15T19:30+0100 2025-02-29".split(),
}


@each("name, value", [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_field_is_named(common, name, value):
    """In creating and updating alike, but that an update may set the tickets to 0."""
    steps = [("POST", "/api/events", 1, {**EVENT, name: value})]
    if value != 0 or value is True:
        steps.append(("PUT", "/api/events/1", 1, {name: value}))
    for step in steps:
        refused = common.call(*step)
        assert (refused.status, refused.content["error"]) == (400, "Validation failed")
        assert list(refused.content["details"]) == [name]


RIGHT = {
    "title": ["x", "x" * 200, "🎟️", '"\\/', "\u0001", "<b>"],
    "availableTickets": [1, 10**9],
    "date": "0001-01-01 9999-12-31 2024-02-29 2026-02-15T19:30".split()
    + "2026-02-15T00:00Z 2026-02-15T19:30:59 2026-02-15T19:30+05:30".split()
    + ["2026-02-15T19:30:00-11:00"],
}


@each("name", RIGHT)
def test_a_right_field_is_kept_as_it_is(call, event, name):
    for value in RIGHT[name]:
        made = call("POST", "/api/events", 1, {**EVENT, name: value})
        assert (made.status, made.content[name]) == (201, value)
        assert call("PUT", "/api/events/1", 1, {name: value}).status == 200
        assert call("GET", "/api/events/1", 2).content[name] == value


@each("body", [None, {}, {"title": "", "date": "", "availableTickets": "", "x": 1}])
def test_every_wrong_field_is_named_at_once(common, body):
    refused = common.call("POST", "/api/events", 1, body)
    assert (refused.status, set(refused.content["details"])) == (400, set(EVENT))


def test_creating_ignores_unknown_fields(call):
    made = call("POST", "/api/events", 1, {**EVENT, "id": 7, "colour": "red"})
    assert made[:2] == (201, {"id": 1, **EVENT})


@each("name", ["colour", "Title", "id", "etag", "__class__"])
def test_updating_refuses_unknown_fields(common, name):
    """A misspelt field that is silently dropped is a lost edit; so is another's id."""
    refused = common.call("PUT", "/api/events/1", 1, {"title": "New", name: 2})
    assert (refused.status, list(refused.content["details"])) == (400, [name])
    assert common.call("GET", "/api/events/1", 1).content["title"] == EVENT["title"]


@each("change", [{"title": "New"}, {"date": "2027-01-01"}, {"availableTickets": 0}])
def test_an_update_changes_only_what_it_names(call, event, change):
    changed = call("PUT", "/api/events/1", 1, change).content["event"]
    assert call("GET", "/api/events/1", 2).content == changed == {**event, **change}
    assert call(*BOOKING).status == (201 if changed["availableTickets"] else 400)


@each("body", [None, {}])
def test_an_update_of_nothing_still_notifies(server, call, event, body):
    """In order of the first live booking, each customer with one once."""
    call("POST", "/api/events", 1, EVENT)
    for number, customer in (1, 2), (1, 3), (2, 2):
        call("POST", f"/api/events/{number}/book", customer)
    call(*CANCELLING)
    call("PUT", "/api/events/1", 1, body)
    for _ in "12":
        call(*BOOKING)
    updated = call("PUT", "/api/events/1", 1, body)
    assert updated.content["event"] == {**event, "availableTickets": 0}
    told = [line.split()[-1] for line in server.printed() if line.startswith("🔔")]
    assert told == ["3", "3", "2"]


def test_cancelling_twice_frees_one_ticket(call, event):
    call(*BOOKING)
    booking = {"id": 1, "eventId": 1, "customerId": 2}
    told = {"message": "Booking cancelled", "booking": booking}
    assert call(*CANCELLING)[:2] == (200, told)
    assert call(*CANCELLING)[:2] == (404, NO_BOOKING)
    assert call("GET", "/api/bookings/1", 2)[:2] == (404, NO_BOOKING)
    assert call("GET", "/api/events/1", 2).content == event
    assert call(*BOOKING).content["booking"]["id"] == 2


HOSTILE = {
    "invalid UTF-8": b'{"title":"\xff"}',
    "overlong UTF-8": b'{"title":"\xc0\xaf"}',
    "UTF-8 surrogate": b'{"title":"\xed\xa0\x80"}',
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-32": BODY.decode().encode("utf-32-le"),
    "BOM": b"\xef\xbb\xbf" + BODY,
    "NaN": b'{"availableTickets":NaN}',
    "Infinity": b'{"availableTickets":Infinity}',
    "minus Infinity": b'{"x":[{"y":-Infinity}]}',
    "1e400": b'{"x":1e400}',
    "lone surrogate": b'{"title":"\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff":1}',
    "deep array": b"[" * 30_000 + b"]" * 30_000,
    "deep object": b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
    "deep and open": b"[" * 65_536,
    "5,000 digits": b'{"availableTickets":' + b"9" * 5000 + b"}",
    "array": b"[" + BODY + b"]",
    "text": b'"x"',
    "number": b"1",
    "null": b"null",
    "blank": b" \r\n",
    "cut": BODY[:-1],
    "garbage behind": BODY + b"x",
    "single quotes": b"{'title':'x'}",
    "trailing comma": b'{"title":"x",}',
    "control character": b'{"title":"\n"}',
    "form": b"title=x&date=2026-02-15&availableTickets=3",
    "NUL": b"\0",
}


@each("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_a_bad_request(common, body):
    for method, path in ("POST", "/api/events"), ("PUT", "/api/events/1"):
        refused = common.call(method, path, 1, body)
        assert refused.status == 400
        assert refused.content["error"].startswith("Invalid JSON: ")


def test_of_a_field_that_comes_twice_the_last_one_counts(call):
    twice = b'{"title":1,' + BODY[1:]
    assert call("POST", "/api/events", 1, twice).content == {"id": 1, **EVENT}


def test_the_content_type_does_not_matter(call):
    for kind in "text/plain", "application/x-www-form-urlencoded", "":
        assert call("POST", "/api/events", 1, EVENT, Content_Type=kind).status == 201


def test_booking_and_cancelling_ignore_a_body(call, event):
    for number, body in enumerate([None, b"!", b"[1]", b"\xff" * 60_000], start=1):
        assert call(*BOOKING, body).status == 201
        assert call("DELETE", f"/api/bookings/{number}", 2, body).status == 200


WORDS = {
    "title": "text of 1 to 200 characters, not blank",
    "date": "a real date, like 2026-02-15 or 2026-02-15T19:30",
    "availableTickets": "an integer from 1 to 1,000,000,000",
}
ADVICE = [  # each bad value is named with what would be right
    (("POST", "/api/events", 1), WORDS),
    (
        ("PUT", "/api/events/1", 1, {"availableTickets": -1, "id": 2, "x": 1}),
        {
            "availableTickets": "an integer from 0 to 1,000,000,000",
            "id": "an integer from 1 to 1",
            "x": "no field of this name is known",
        },
    ),
    (
        ("GET", "/api/events?limit=0&offset=-1&available=", 2),
        {
            "limit": "an integer from 1 to 1,000",
            "offset": "an integer from 0 up",
            "available": "true or false",
        },
    ),
]


@each("step, details", ADVICE)
def test_each_bad_value_is_named_with_what_would_be_right(common, step, details):
    refused = common.call(*step)
    assert refused.content == {"error": "Validation failed", "details": details}


# ---- Retries and lost updates ------------------------------------------------


def test_a_retry_with_a_key_acts_once(server, call, event):
    """Nothing happens twice, not even when the booking has been cancelled since."""
    first = call(*BOOKING, Idempotency_Key="~" * 255)
    assert first.status == 201
    assert call(*BOOKING, Idempotency_Key="~" * 255)[:2] == first[:2]
    call(*CANCELLING)
    assert call(*BOOKING, Idempotency_Key="~" * 255)[:2] == first[:2]
    assert call("GET", "/api/events/1", 2).content == event
    assert [entry["data"]["id"] for entry in server.entries()] == [1, 1]
    assert len(server.printed()) == 1


def test_a_key_is_for_one_event_and_one_customer(call, event):
    call("POST", "/api/events", 1, EVENT)
    assert call(*BOOKING, Idempotency_Key="k").status == 201
    refused = call("POST", "/api/events/2/book", 2, Idempotency_Key="k")
    error = {"error": "Idempotency-Key was used for another event"}
    assert refused[:2] == (422, error)
    theirs = call("POST", "/api/events/2/book", 3, Idempotency_Key="k")
    assert theirs.content["booking"] == {"id": 2, "eventId": 2, "customerId": 3}


def test_a_refused_booking_leaves_its_key_free(call, event):
    """And one that was made keeps it, though nothing is left."""
    for tickets, status in (0, 400), (1, 201), (0, 201):
        call("PUT", "/api/events/1", 1, {"availableTickets": tickets})
        assert call(*BOOKING, Idempotency_Key="k").status == status


@each("key", ["", "a b", "a\tb", "ä", "x" * 256])
def test_a_key_is_1_to_255_visible_characters(common, key):
    refused = common.call(*BOOKING, Idempotency_Key=key)
    details = {"Idempotency-Key": "1 to 255 visible characters"}
    wanted = {"error": "Validation failed", "details": details}
    assert refused[:2] == (400, wanted)


def test_the_newest_ten_thousand_keys_are_remembered():
    """The store is asked, which is sooner done than 10,000 requests are read."""
    store, ask = on_sale(20_000)
    keys = [{"idempotency-key": str(key)} for key in [*range(10_001), 1, 0]]
    ids = [store.book(ask._replace(fields=fields)).id for fields in keys]
    assert ids == [*range(1, 10_002), 2, 10_002]


CHANGES = [
    ("PUT", "/api/events/1", 1, {"title": "New"}),
    ("PUT", "/api/events/1", 1, {"availableTickets": 9}),
    BOOKING,
    CANCELLING,
    ("PUT", "/api/events/1", 1, EVENT),
]


def test_the_etag_changes_with_the_event_and_never_comes_back(call, event, common):
    """Though the event does, and not in another run either; else it stays."""
    tags = [site.call("GET", "/api/events/1", 1).fields["etag"] for site in (common,)]
    for change in CHANGES:
        tags.append(call("GET", "/api/events/1", 1).fields["etag"])
        call("POST", "/api/events", 1, EVENT)
        unchanged = call("PUT", "/api/events/1", 1, {})
        assert unchanged.fields["etag"] == tags[-1]
        assert call(*change).status in (200, 201)
    tags.append(call("GET", "/api/events/1", 2).fields["etag"])
    assert len(set(tags)) == 7
    assert all(re.fullmatch(r'"[0-9a-f]{12}-\d+"', tag) for tag in tags)


def test_the_current_etag_lets_an_update_pass(call, event):
    tag = call("GET", "/api/events/1", 1).fields["etag"]
    for wanted in tag, f'"old", {tag}', "*":
        updated = call("PUT", "/api/events/1", 1, {}, If_Match=wanted)
        assert (updated.status, updated.fields["etag"]) == (200, tag)


def test_a_stale_etag_stops_an_update(server, call, event):
    stale = call("GET", "/api/events/1", 1).fields["etag"]
    call(*BOOKING)
    now = call("GET", "/api/events/1", 1)
    tag = now.fields["etag"]
    for wanted in stale, f"W/{tag}", f'{stale}, "older"', '"*"', tag[1:-1], "":
        refused = call("PUT", "/api/events/1", 1, {"title": "New"}, If_Match=wanted)
        assert (refused.status, refused.fields["etag"]) == (412, tag)
    assert call("GET", "/api/events/1", 1).content == now.content
    assert len(server.printed()) == 1


def test_an_event_that_was_read_can_be_edited_and_put_back(call, event):
    read = call("GET", "/api/events/1", 1)
    edited = {**read.content, "title": "New"}
    put = call("PUT", "/api/events/1", 1, edited, If_Match=read.fields["etag"])
    assert put.content["event"] == edited


# ---- Lists -------------------------------------------------------------------


@pytest.fixture
def shelf(call):
    """Events 1 to 5, the even ones sold out: bookings 1 and 2 by customers 2 and 3."""
    for _ in range(5):
        call("POST", "/api/events", 1, {**EVENT, "availableTickets": 1})
    call("POST", "/api/events/2/book", 2)
    call("POST", "/api/events/4/book", 3)


PAGES = [
    ("", [1, 2, 3, 4, 5], 5),
    ("?", [1, 2, 3, 4, 5], 5),
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


@each("query", [*BAD_PAGES.split(), *BAD_AVAILABLE], ids=lambda query: query[:16])
def test_a_bad_page_is_refused_by_every_list(common, query):
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
    """Or it would be taken for the next answer."""
    for front in b"", b"\r\n":
        with common.connect() as client, client.makefile("rb") as file:
            octets = request("HEAD", "/nowhere", "Connection: close", fields)
            client.sendall(front + octets)
            assert file.read().endswith(b"\r\n\r\n")


# ---- The oracle --------------------------------------------------------------
# A model so plain that it is seen to be right answers the same random history.


class Model:
    """The store in two dicts: no clients, no log, no console."""

    def __init__(self):
        self.events, self.bookings, self.last = {}, {}, 0

    def create(self, _, user, body):
        event = {"id": len(self.events) + 1, **body}
        self.events[event["id"]] = event
        return (201, event) if user == 1 else self.events.popitem() and (403, DENIED)

    def update(self, id, user, body):
        if user != 1 or id not in self.events:
            return (403, DENIED) if user != 1 else (404, NO_EVENT)
        self.events[id].update(body)
        return 200, {"message": "Event updated", "event": self.events[id]}

    def list(self, _, user, __):
        return (403, DENIED) if user == 1 else (200, list(self.events.values()))

    def book(self, id, user, _):
        if user == 1 or id not in self.events:
            return (403, DENIED) if user == 1 else (404, NO_EVENT)
        if not self.events[id]["availableTickets"]:
            return 400, SOLD_OUT
        self.events[id]["availableTickets"] -= 1
        self.last += 1
        booking = {"id": self.last, "eventId": id, "customerId": user}
        self.bookings[self.last] = booking
        return 201, {"message": "Booking successful", "booking": booking}

    def cancel(self, id, user, _):
        if user == 1 or id not in self.bookings:
            return (403, DENIED) if user == 1 else (404, NO_BOOKING)
        if self.bookings[id]["customerId"] != user:
            return 403, DENIED
        booking = self.bookings.pop(id)
        self.events[booking["eventId"]]["availableTickets"] += 1
        return 200, {"message": "Booking cancelled", "booking": booking}


VERBS = {  # method, path, share of a history
    "create": ("POST", "/api/events", 1),
    "update": ("PUT", "/api/events/{}", 1),
    "list": ("GET", "/api/events", 1),
    "book": ("POST", "/api/events/{}/book", 8),
    "cancel": ("DELETE", "/api/bookings/{}", 6),
}


def random_step(chance, model):
    """(verb, id, user, body), half of the time such that it is let through."""
    (verb,) = chance.choices(list(VERBS), [share for _, _, share in VERBS.values()])
    writes = verb in ("create", "update")
    user = chance.choice([1] * 18 + [2] if writes else [2, 3] * 9 + [1])
    last = model.last if verb == "cancel" else len(model.events)
    body = {"title": str(chance.random())} if writes else None
    if verb == "create":
        body.update(date="2026-02-15", availableTickets=chance.randint(1, 9))
    return verb, chance.randint(max(0, last - 9), last + 1), user, body


def live_bookings(entries):
    """The bookings that a log leaves, by id."""
    live = {}
    for entry in entries:
        if entry["event"] == "booking.created":
            live[entry["data"]["id"]] = entry["data"]
        else:
            assert live.pop(entry["data"]["id"]) == entry["data"]
    return live


@each("seed", range(4))
def test_a_random_history_is_answered_as_the_model_says(server, call, seed):
    """Each answer is the model's; sold and left are each event's capacity; the log
    replays to exactly the live bookings."""
    chance, model, capacity = random.Random(seed), Model(), {}
    for _ in range(300):
        verb, id, user, body = random_step(chance, model)
        method, path, _ = VERBS[verb]
        status, content, _ = call(method, path.format(id), user, body)
        assert (status, content) == getattr(model, verb)(id, user, body)
        if (verb, status) == ("create", 201):
            capacity[content["id"]] = content["availableTickets"]
    sold = [one["eventId"] for one in model.bookings.values()]
    for event in call("GET", "/api/events", 2).content:
        left = event["availableTickets"]
        assert left + sold.count(event["id"]) == capacity[event["id"]]
    assert live_bookings(server.entries()) == model.bookings
    own = [one for user in (2, 3) for one in call("GET", "/api/bookings", user).content]
    assert {one["id"]: one for one in own} == model.bookings


# ---- Races -------------------------------------------------------------------


def test_64_threads_get_exactly_the_200_tickets_there_are(server, call, event):
    """No ticket twice, none left, and the log in the order of the ids."""
    call("PUT", "/api/events/1", 1, {"availableTickets": 200})

    def book(number):
        path, user = "/api/events/1/book", 2 + number % 2
        booked = iter(lambda: call("POST", path, user)[:2], (400, SOLD_OUT))
        return [content["booking"]["id"] for status, content in booked]

    made = [booking for mine in together(64, book) for booking in mine]
    assert sorted(made) == list(range(1, 201))
    assert [entry["data"]["id"] for entry in server.entries()] == list(range(1, 201))
    assert call("GET", "/api/events/1", 2).content["availableTickets"] == 0
    assert len(server.printed()) == 200


def test_the_store_itself_sells_no_ticket_twice():
    """Its lock, without the server in front of it: eight threads at once."""
    sold, (store, ask) = [], on_sale(2000)

    def book(_):
        with contextlib.suppress(eventbook.Refusal):
            while True:
                sold.append(store.book(ask).id)

    together(8, book)
    assert sorted(sold) == list(range(1, 2001))


def test_many_with_one_key_make_one_booking(server, call, event):
    made = together(32, lambda _: call(*BOOKING, Idempotency_Key="k")[:2])
    assert made[0][0] == 201
    assert made == [made[0]] * 32
    assert call("GET", "/api/events/1", 2).content["availableTickets"] == 2
    assert len(server.entries()) == len(server.printed()) == 1


def test_of_many_with_one_etag_one_updates(call, event):
    tag = call("GET", "/api/events/1", 1).fields["etag"]

    def put(number):
        return call("PUT", "/api/events/1", 1, {"title": str(number)}, If_Match=tag)

    made = sorted(together(32, put), key=lambda one: one.status)
    assert statuses(made) == [200] + [412] * 31
    assert call("GET", "/api/events/1", 1).content == made[0].content["event"]


def test_no_update_is_lost_and_no_ticket_among_book_cancel_and_put(server, call, event):
    """Eight book and cancel; eight count up in the title: they read, add one and put it
    back with If-Match. The count is right, and sold and left are the capacity."""
    call("PUT", "/api/events/1", 1, {"title": "0", "availableTickets": 20})

    def act(number):
        if number % 2:
            for booking in range(number, 60, 4):
                call("POST", "/api/events/1/book", 2 + number % 4 // 2)
                call("DELETE", f"/api/bookings/{booking}", 2 + number % 4 // 2)
            return
        status = 412
        while status == 412:
            read = call("GET", "/api/events/1", 1)
            body = {"title": str(int(read.content["title"]) + 1)}
            tag = read.fields["etag"]
            status = call("PUT", "/api/events/1", 1, body, If_Match=tag).status

    together(16, act)
    left = call("GET", "/api/events/1", 2).content
    sold = call("GET", "/api/events/1/bookings", 1).content
    assert (left["title"], left["availableTickets"] + len(sold)) == ("8", 20)
    assert live_bookings(server.entries()) == {one["id"]: one for one in sold}


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
    400: "X : 1|X\t: 1| X: 1|\tX: 1|X|X 1|: 1|X@Y: 1|X(Y): 1|Xä: 1|\xa0X: 1|X/Y: 1|X[:1"
    '|X,Y: 1|X;Y: 1|=: 1|{X}: 1|"X": 1|X\\: 1|X<: 1| |\t|X: 1\r\n |Host : a|HOST: b'
    "|X: \0|X: a\0b|X: \x01|X: \x7f|X: \x1b[31m|X: \x0b|X: \x0c|\0X: 1|X\0: 1|X: a\n b"
    "|X: a\rb|X: a\nb|X: a\nY: b|X: a\rContent-Length: 9|X: a\r|X: a\n|\rX: a|X: a\r\r"
    "|X: a\r\n b|X: a\r\n\tb|X: a\r\n  |Host: a|Host: b|HOST: a|host: a",
    431: "X: " + "x" * 16384 + "|" + "\r\n".join(["X: 1"] * 100),
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
    b"GET / HTTP/1.1\nHost: a\n\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\n\n": 400,
    b"GET / HTTP/1.1\rHost: a\r\r": 400,
    b"GET / HTTP/1.1\r\nHost: a\xff\r\n\r\n": 400,
    b"\r\n\r\n" + GET: 400,
    bytes(range(256)): 400,
    b"\0" * 100: 400,
    b"\n" * 100: 400,
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
    **OCTETS,
}


def check_standing_fields(one):
    """Every answer with content has them, the parser's own refusals included."""
    assert one.fields["content-type"] == "application/json; charset=utf-8"
    assert one.fields["cache-control"] == "no-store"
    assert one.fields["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", one.fields["date"])
    assert len(one.content) == int(one.fields["content-length"])
    assert one.content.endswith(b"\n")
    assert "python" not in str(one).lower()


@each("octets, status", MALFORMED.items(), ids=lambda case: ascii(case)[2:62])
def test_a_malformed_request_is_refused_and_its_connection_closed(
    common, octets, status
):
    assert len(MALFORMED) > 250
    for before, behind in (b"", b""), (GET, b""), (b"", GET):
        *answered, refused = common.talk(before + octets + behind, half_close=False)
        assert statuses(answered) == [200] * bool(before)
        assert (refused.status, refused.fields["connection"]) == (status, "close")
        assert json.loads(refused.content)["error"]
        check_standing_fields(refused)


def of_size(line, header, count):
    """A request with a request line, a header and so many fields of these sizes."""
    fields = "Host: a\r\n" + "X: 1\r\n" * (count - 2)
    line = "GET /?" + "x" * (line - len("GET /? HTTP/1.1")) + " HTTP/1.1\r\n"
    return f"{line}{fields}X: {'x' * (header - len(fields) - 5)}\r\n\r\n".encode()


CONVERSATIONS = {  # what is answered to these and a GET behind
    (200, 200): [
        b"\r\n" + GET,
        b"GET / HTTP/1.1\r\nHost:a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHOST: \t a \t \r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]:3000\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost:3000\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \xe4\r\n\r\n",
        request("GET", "http://a/"),
        request("GET", "HTTP://A:80/"),
        request("GET", "https://a?x"),
        request("GET", "/?a=b?c/d&%zz"),
        request("GET", "/", "X:", "X: a\tb", "!#$%&'*+-.^_`|~09azAZ: 1"),
        request("GET", "/", "Content-Length: 0000000002") + b"xx",
        request("GET", "/", body=GET),
        request("GET", "/", KEEP, 'Connection: TE, closed, "close"'),
        request("GET", "/", "Connection:"),
        of_size(8192, 1024, 9),
        of_size(99, 16384, 9),
        of_size(99, 1024, 100),
        of_size(8192, 16384, 100),
        request("GET", "/", body=b" " * 65536),
        request("GET", "/", EXPECT, body=b" " * 65536),
    ],
    (200,): [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
        request("GET", "/", "Connection: close"),
        request("GET", "/", "Connection: x ,\tClose ,"),
        request("GET", "/", KEEP, "Connection: close"),
        request("GET", "/", "Connection: close", KEEP),
    ],
    (204, 200): [request("OPTIONS", "*")],
    (400, 200): [request("POST", "/api/events", user=1, body=GET)],
    (401, 200): [request("POST", "/api/events", body=GET)],
    (403, 200): [request("POST", "/api/events", user=2, body=GET)],
    (404, 200): [request("POST", "/nowhere", body=GET)],
    (405, 200): [request("PATCH", "/", body=GET)],
    (501, 200): [request("BREW", "/", body=GET)],
    (413,): [request("GET", "/", body=b" " * 65537)],
    (414,): [of_size(8193, 1024, 9)],
    (431,): [of_size(99, 16384 + 3, 9), of_size(99, 1024, 101)],  # without its line end
}
SAID = {  # what a refusal tells a person
    b"\0": "Malformed request",
    b"GET /\r\n\r\n": "Malformed request line or field line",
    of_size(8193, 1024, 9): "Request line too long",
    of_size(99, 1024, 101): "Header too large",
    b"GET / HTTP/2.0\r\n\r\n": "HTTP/1.0 and HTTP/1.1 are spoken here",
    b"GET / HTTP/1.1\r\n\r\n": "Exactly one valid Host is needed",
    request("GET", "a"): "Invalid request target",
    request("GET", "/", "Content-Length: x"): "Invalid Content-Length",
    request("GET", "/", "Content-Length: 65537"): "Content too large",
    request("GET", "/", "Transfer-Encoding: x"): (
        "Content-Length is needed, and no Transfer-Encoding"
    ),
    request("BREW", "/"): "Method not implemented",
    request("PUT", "/"): "Method not allowed",
    request("PUT", "/api/events/1", "If-Match: x", user=1): "Event has changed",
    request("POST", "/api/events", user=1, body=b"[]"): (
        "Invalid JSON: an object is wanted"
    ),
    request("POST", "/api/events", user=1, body=b"{"): (
        "Invalid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)"
    ),
}


@each("octets, text", SAID.items(), ids=lambda case: ascii(case)[2:62])
def test_a_refusal_says_what_is_wrong(common, octets, text):
    (refused,) = common.talk(octets)
    assert json.loads(refused.content) == {"error": text}


ALL = [
    (octets, expected)
    for expected in CONVERSATIONS
    for octets in CONVERSATIONS[expected]
]


@each("octets, expected", ALL, ids=lambda case: ascii(case)[:60])
def test_a_conversation_goes_on_or_is_closed(common, octets, expected):
    found = common.talk(octets + GET, half_close=len(expected) == 2)
    assert statuses(found) == list(expected)
    assert [one.fields.get("connection") for one in found] in ([None, None], ["close"])
    check_standing_fields(found[-1])


@each("status, octets", [(414, b"X" * 8193), (431, GET[:-2] + b"X: " + b"x" * 16384)])
def test_a_head_that_is_too_large_is_refused_before_its_end(common, status, octets):
    assert statuses(common.talk(octets, half_close=False)) == [status]


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
    assert statuses(server.talk(INVITED, BODY)) == [100, 201]
    assert statuses(server.talk(INVITED.replace(b"1.1", b"1.0", 1), BODY)) == [201]


@each("status, head", NOT_INVITED)
def test_who_would_be_refused_is_not_told_to_continue(common, status, head):
    assert statuses(common.talk(head, half_close=False)) == [status]


def test_nothing_a_client_sent_is_echoed_unescaped(common):
    body = {'"\r\nSet-Cookie: x\x1b<script>': 1}
    octets = request("PUT", "/api/events/1", user=1, body=json.dumps(body).encode())
    (refused,) = common.talk(octets)
    assert (refused.status, "set-cookie" in refused.fields) == (400, False)
    assert json.loads(refused.content)["details"].keys() == body.keys()
    assert not re.search(b"[\r\x1b]|\n.", refused.content)


def test_each_request_on_a_connection_may_wait_to_be_asked(server):
    octets = request("POST", "/api/events", EXPECT, user=1, body=BODY)
    with server.connect() as client:
        for number in 1, 2:
            client.sendall(octets[: -len(BODY)])
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(BODY)
            assert answer(client).content["id"] == number


# ---- Cruelty -----------------------------------------------------------------

SPLIT = {
    "create": (201, CREATE),
    "list": (200, LIST),
    "refused": (401, request("POST", "/api/events", body=b"{}")),
    "malformed": (400, request("GET", "/", "X : 1")),
    "two line ends in front": (400, b"\r\n\r\n" + GET),
}


@each("status, octets", SPLIT.values(), ids=SPLIT)
def test_a_request_split_anywhere_is_answered_the_same(server, status, octets):
    for at in range(1, len(octets)):
        assert statuses(server.talk(octets[:at], octets[at:])) == [status], at


def test_a_request_may_come_octet_by_octet(server):
    found = server.talk(*[CREATE[at : at + 1] for at in range(len(CREATE))])
    assert statuses(found) == [201]


def test_pipelined_requests_are_answered_in_order(server):
    paths = [f"/api/events/{number}" for number in range(1, 51)]
    reads = [request("GET", path, user=2) for path in paths]
    found = server.talk(CREATE * 50 + b"".join(reads))
    assert statuses(found) == [201] * 50 + [200] * 50
    assert [json.loads(one.content)["id"] for one in found] == [*range(1, 51)] * 2


def test_a_second_answer_does_not_wait_for_the_first_to_be_acknowledged(common):
    """Nagle's algorithm would hold it back for 40 ms."""
    begun = time.monotonic()
    with common.connect() as client:
        for _ in range(50):
            client.sendall(GET + GET)
            found = b""
            while found.count(b"HTTP/1.1 200 OK") < 2:
                found += client.recv(99_999)
    assert time.monotonic() - begun < 1


def test_a_request_cut_anywhere_is_never_acted_on(server, call, event):
    for octets in CREATE, BOOK:
        for at in range(len(octets)):
            assert server.talk(octets[:at]) == [], at
    assert call("GET", "/api/events", 2).content == [event]
    assert server.entries() == []


def mutated(chance, octets):
    """A valid request with up to three wounds."""
    octets = bytearray(octets)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(octets))
        octet = bytes([chance.randrange(256)])
        wound = chance.choice([b"", octet, octet, b"\r\n", b" ", b"9:"])
        octets[at : at + chance.choice([0, 1, 1, 9])] = wound
    return bytes(octets)


@each("seed", range(3))
def test_mutations_are_answered_or_dropped_but_never_a_defect(server, call, seed):
    """No 5xx but 501 and 505, no hang, and the server lives on."""
    chance = random.Random(seed)
    put = request("PUT", "/api/events/1", 'If-Match: "x", *', user=1, body=b'{"id":1}')
    keyed = request("POST", "/api/events/1/book", "Idempotency-Key: k", user=3)
    for _ in range(100):
        octets = mutated(chance, chance.choice([CREATE, LIST, BOOK, put, keyed]))
        for found in server.talk(octets):
            assert found.status < 500 or found.status in (501, 505), octets
    assert call("GET", "/api/events", 2).status == 200


def long_list(site, events=300):
    """Put so much on sale that sockets' buffers do not hold eighty lists of it."""
    body = json.dumps({**EVENT, "title": "\x01" * 200}).encode()
    site.talk(request("POST", "/api/events", user=1, body=body) * events)


@contextlib.contextmanager
def stuck_client(site):
    """A client that asks for 30 MB, sees them begin, and reads nothing of it."""
    with site.connect() as client:
        client.sendall(LIST * 80)
        client.recv(1, socket.MSG_PEEK)
        yield client


def open_files():
    return len(os.listdir("/dev/fd"))


STATES = {
    "idle": b"",
    "half a head": CREATE[:20],
    "half a body": CREATE[:-9],
    "just asked": LIST,
    "refused": b"\0",
    "refused with more to come": b"\0" * 100_000,
    "not reading": LIST * 80,
}


@posix
@each("octets", STATES.values(), ids=STATES)
def test_a_client_that_vanishes_leaves_nothing_behind(server, call, octets):
    """Ten reset their connections; threads and descriptors are as before."""
    threads, files, clients = threading.active_count(), open_files(), []
    long_list(server)
    for _ in range(10):
        clients.append(server.connect())
        clients[-1].sendall(octets)
    server.pause()
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    eventually(lambda: threading.active_count() <= threads and open_files() <= files)
    assert call("GET", "/api/events", 2).status == 200


class Hasty(eventbook.Server):
    request_time = answer_time = 0.25
    linger_time = 0.2


@pytest.fixture
def hasty(tmp_path):
    """A server whose patience is short."""
    with whole_server(tmp_path / "log", Hasty) as site:
        yield site


@posix
def test_a_client_that_never_reads_is_closed_and_holds_up_nobody(hasty):
    long_list(hasty)
    with stuck_client(hasty) as client:
        assert hasty.call("GET", "/api/events", 2).status == 200
        eventually(lambda: not hasty.server.handlers)
        with contextlib.suppress(ConnectionResetError):
            assert len(read_to_end(client)) < 80


def test_a_client_that_reads_late_gets_all_of_it(server):
    long_list(server)
    with stuck_client(server) as client:
        client.shutdown(socket.SHUT_WR)
        assert statuses(read_to_end(client)) == [200] * 80


@each("octets", [CREATE * 9, b"\0"], ids=["asking", "refused"])
def test_a_client_that_drips_is_closed_at_the_deadline(hasty, octets):
    """However regularly octets come, the whole request has one deadline."""
    begun = time.monotonic()
    with hasty.connect() as client, pytest.raises(OSError):
        client.settimeout(0.01)
        for octet in itertools.cycle(octets):
            assert time.monotonic() - begun < 3
            client.sendall(bytes([octet]))
            with contextlib.suppress(socket.timeout):
                client.recv(99_999)
    assert hasty.call("GET", "/api/events", 2).content == []


def test_a_request_that_came_while_the_server_was_held_up_is_not_overdue():
    """Not even one that it takes two looks to read."""
    with held_up(Hasty) as (site, hold, go_on), site.connect() as other:
        site.pause()
        with site.connect() as busy:
            hold(busy)
            other.sendall(request("GET", "/", "X: " + "x" * 9999, body=b" " * 65536))
            let_pass(Hasty.request_time)
            go_on.set()
            assert answer(other).status == 200


@each("octets, expected", [(b"", []), (CREATE[:-1], []), (GET, [200])])
def test_an_idle_client_is_closed(hasty, octets, expected):
    with hasty.connect() as client:
        client.sendall(octets)
        assert statuses(read_to_end(client)) == expected


class Small(eventbook.Server):
    connection_limit = 2


@pytest.fixture
def small(tmp_path):
    """A server with room for two."""
    with whole_server(tmp_path / "log", Small) as site:
        yield site


def test_the_longest_idle_makes_room(small):
    """The first to come has spoken since; so it is the second that is closed."""
    with small.connect() as first, small.connect() as second:
        for client in first, second, first:
            client.sendall(GET)
            assert answer(client).status == 200
        begun = time.monotonic()
        with small.connect() as third:
            assert second.recv(1) == b""
            assert time.monotonic() - begun < 0.9
            for client in third, first:
                client.sendall(GET)
                assert answer(client).status == 200


class Thronged(eventbook.Server):
    """Whenever somebody is let in there is somebody else, so many times."""

    coming = 0

    def get_request(self):
        if self.coming:
            self.coming -= 1
            self.throng.enter_context(socket.create_connection(self.server_address))
        return super().get_request()


def test_a_throng_of_newcomers_starves_nobody():
    """The request of one who is known came just behind the first of them."""
    with contextlib.ExitStack() as stack, held_up(Thronged) as (site, hold, go_on):
        busy, kept = (stack.enter_context(site.connect()) for _ in "12")
        kept.sendall(GET)
        assert answer(kept).status == 200
        hold(busy)
        site.server.throng, site.server.coming = stack, 200
        stack.enter_context(site.connect())
        kept.sendall(GET)
        go_on.set()
        assert answer(kept).status == 200
        assert site.server.coming > 0


def test_when_all_are_at_work_a_client_is_sent_away(small):
    long_list(small)
    with stuck_client(small), stuck_client(small):
        refused = small.call("GET", "/")
        assert refused[:2] == (503, {"error": "All connections are at work"})
        assert refused.fields["retry-after"] == "1"
        assert refused.fields["connection"] == "close"
    eventually(lambda: small.call("GET", "/").status == 200)


def test_whoever_comes_while_all_are_at_work_is_sent_away(small):
    """However many: none is closed for the next one, but each is told."""
    long_list(small)
    with stuck_client(small), stuck_client(small), contextlib.ExitStack() as stack:
        more = [stack.enter_context(small.connect()) for _ in range(9)]
        for client in more:
            client.sendall(GET)
        assert [answer(client).status for client in more] == [503] * 9


def test_those_who_were_sent_away_take_no_room(small):
    """Nor do those who would be, but never ask."""
    long_list(small)
    with stuck_client(small), contextlib.ExitStack() as stack:
        with stuck_client(small):
            for _ in "123":
                stack.enter_context(small.connect())
            assert small.call("GET", "/").status == 503
        eventually(lambda: small.call("GET", "/").status == 200)


def test_who_came_when_all_were_at_work_may_be_served_later(small):
    """What counts is the moment when it asks."""
    long_list(small)
    with contextlib.ExitStack() as stack:
        with stuck_client(small), stuck_client(small):
            late = stack.enter_context(small.connect())
            assert small.call("GET", "/").status == 503
        eventually(lambda: len(small.server.handlers) == 1)
        late.sendall(GET)
        assert answer(late).status == 200


def test_who_has_just_asked_does_not_make_room_unanswered():
    """The only place is taken by one who asks while a newcomer comes in."""
    asking = []

    class One(eventbook.Server):
        connection_limit = 1

        def get_request(self):
            newcomer = super().get_request()
            if asking:
                asking.pop().sendall(GET)
            return newcomer

    with serving(eventbook.Store(), One) as site, site.connect() as kept:
        kept.sendall(GET)
        assert answer(kept).status == 200
        asking.append(kept)
        assert site.call("GET", "/").status == 200
        assert answer(kept).status == 200


def test_who_sends_many_requests_at_once_waits_for_the_others():
    """One answer each, in turn: here the other one comes before the last of many."""
    with held_up() as (site, hold, go_on), site.connect() as many:
        hold(many, BOOK * 500)
        with site.connect() as other:
            other.sendall(request("GET", "/api/events/1", user=2))
            go_on.set()
            assert answer(other).content["availableTickets"] > 0
            many.shutdown(socket.SHUT_WR)
            assert statuses(read_to_end(many)) == [200] + [201] * 3 + [400] * 497


def test_who_asks_for_what_takes_long_has_one_turn_too():
    """Three have sent ten requests of 10 ms each; a fourth asks for the root."""
    store, turns = slow_store(0.01), []
    store.on("event.updated", lambda *_: turns.append(1))
    with serving(store) as site, contextlib.ExitStack() as stack:
        site.call("POST", "/api/events", 1, EVENT)
        *many, other = [stack.enter_context(site.connect()) for _ in "1234"]
        for client in many:
            client.sendall(request("PUT", "/api/events/1", user=1) * 10)
        other.sendall(GET)
        assert answer(other).status == 200
        assert len(turns) < 15


def test_one_that_speaks_while_it_might_make_room_is_answered():
    with held_up(Small) as (site, hold, go_on):
        with site.connect() as idle, site.connect() as busy:
            hold(busy)
            with site.connect() as third:
                idle.sendall(GET)
                third.sendall(GET)
                go_on.set()
                assert [answer(one).status for one in (busy, idle, third)] == [200] * 3
        assert site.call("GET", "/").status == 200


def test_a_refusal_can_be_read_by_a_client_that_still_sends(server):
    """Closing with unread input would reset the connection and take the answer back."""
    octets = request("GET", "/", "X : 1") + b"x" * 1_000_000
    assert statuses(server.talk(octets)) == [400]


def test_a_last_answer_too(server):
    """Old clients send an empty line behind a request."""
    octets = request("GET", "/", "Connection: close")
    for _ in range(20):
        assert statuses(server.talk(octets, b"\r\n")) == [200]


def test_a_refused_client_may_take_its_time(server):
    with server.connect() as client:
        client.sendall(b"\0")
        for _ in range(50):
            server.pause()
            client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
        assert statuses(read_to_end(client)) == [400]


# ---- Faults ------------------------------------------------------------------

DEFECTS = [
    ("booking.created", BOOKING),
    ("event.updated", ("PUT", "/api/events/1", 1, {"title": "New"})),
    ("booking.cancelled", CANCELLING),
]


@each("name, step", DEFECTS)
def test_a_defect_of_ours_changes_nothing(capsys, name, step):
    """It is a 500 for the client, a traceback for stderr; nobody else is told of it."""
    faulty, told, store = [], [], eventbook.Store()
    with serving(store) as site:
        for change in ("POST", "/api/events", 1, EVENT), BOOKING:
            site.call(*change)
        store.on(name, lambda *_: faulty and 1 / 0)
        store.on(name, lambda *_: told.append(name))
        views = "/api/events/1", "/api/events/1/bookings"
        before = [site.call("GET", view, 1).content for view in views]
        faulty.append(True)
        assert site.call(*step)[:2] == (500, {"error": "Internal server error"})
        assert [site.call("GET", view, 1).content for view in views] == before
        assert (told, capsys.readouterr().err.count("ZeroDivisionError")) == ([], 1)
        faulty.clear()
        assert (site.call(*step).status < 300, told) == (True, [name])


def test_it_is_started_as_any_other_server_is():
    mine, base = eventbook.Server.serve_forever, socketserver.BaseServer.serve_forever
    assert inspect.signature(mine) == inspect.signature(base)


@posix
def test_a_stopped_server_leaves_no_descriptor_open():
    held = open_files()
    with serving(eventbook.Store()) as site:
        assert site.call("GET", "/").status == 200
        assert open_files() > held
    eventually(lambda: open_files() <= held)


def test_out_of_descriptors_it_neither_spins_nor_sleeps_long():
    tries = []

    class Exhausted(eventbook.Server):
        def get_request(self):
            tries.append(time.monotonic())
            raise OSError("Too many open files")

    with serving(eventbook.Store(), Exhausted) as site, site.connect():
        eventually(lambda: len(tries) >= 3)
    assert 0.09 < tries[2] - tries[0] < 0.9


def test_who_stood_in_the_queue_when_it_was_stopped_is_answered():
    with held_up() as (site, hold, go_on), contextlib.ExitStack() as stack:
        busy = stack.enter_context(site.connect())
        hold(busy)
        late = [stack.enter_context(site.connect()) for _ in range(99)]
        for client in late:
            client.sendall(GET)
        site.server.shutdown()
        let_pass(0.02)  # and its poll with it
        go_on.set()
        assert [answer(client).status for client in (busy, *late)] == [200] * 100


def test_whoever_had_asked_when_it_was_stopped_is_answered():
    """However long each takes; also one who had begun to, and all of one's requests."""
    put = request("PUT", "/api/events/1", user=1)
    with serving(slow_store(0.06)) as site, contextlib.ExitStack() as stack:
        site.call("POST", "/api/events", 1, EVENT)
        first, *clients, half = [stack.enter_context(site.connect()) for _ in "1234"]
        for client in first, *clients:
            client.sendall(put + GET + GET)
        half.sendall(put[:-2])
        assert answer(first).status == 200
        site.server.shutdown()
        for client in clients:
            assert statuses(read_to_end(client)) == [200] * 3
        half.sendall(put[-2:])
        assert answer(half).fields["connection"] == "close"


class Short(eventbook.Server):
    grace_time = 0.1


def test_many_that_take_long_do_not_hold_up_the_end_together():
    """Forty have asked for what takes 50 ms each; the server stops in the middle."""
    with contextlib.ExitStack() as stack:
        with serving(slow_store(0.05), Short) as site:
            site.call("POST", "/api/events", 1, EVENT)
            clients = [stack.enter_context(site.connect()) for _ in range(40)]
            for client in clients:
                client.sendall(request("PUT", "/api/events/1", user=1))
            assert answer(clients[0]).status == 200
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 0.9


def test_the_server_stays_awake_for_the_next_request_but_not_for_long():
    """0.3 s after an answer have taken less than a third of the processor's time."""
    with serving(eventbook.Store(), poll=0.4) as site, site.connect() as client:
        client.sendall(GET)
        assert answer(client).status == 200
        begun = time.process_time()
        let_pass(0.3)
        assert time.process_time() - begun < 0.1


def test_an_idle_client_does_not_hold_up_the_end():
    with contextlib.ExitStack() as stack:
        with serving(eventbook.Store()) as site:
            idle = stack.enter_context(site.connect())
            idle.sendall(GET)
            assert answer(idle).status == 200
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 0.9


class Faulty(eventbook.Server):
    answer_time = "a defect"


def test_a_defect_of_a_connection_ends_that_one_alone(capsys):
    with serving(eventbook.Store(), Faulty) as site:
        for _ in "12":
            assert site.talk(GET, half_close=False) == []
    assert capsys.readouterr().err.count("TypeError") == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_logged_does_not_happen():
    with whole_server("/dev/full") as site:
        event = site.call("POST", "/api/events", 1, EVENT).content
        refused = site.call(*BOOKING, Idempotency_Key="k")
        text = "The log cannot be written; nothing was changed, try again later"
        assert refused[:2] == (503, {"error": text})
        assert int(refused.fields["retry-after"]) > 0
        assert site.call("GET", "/api/events/1", 2).content == event
        assert site.call("GET", "/api/bookings", 2).content == []
        assert site.printed() == []


@linux
def test_a_full_disk_leaves_whole_lines_until_there_is_room_again(program):
    """The limit cuts the third line in the middle, and a cancelling too."""
    program.call("POST", "/api/events", 1, EVENT)
    assert [program.call(*BOOKING).status for _ in "12"] == [201, 201]
    held = program.log.read_bytes()
    for limit, status in (len(held) + 40, 503), (resource.RLIM_INFINITY, 201):
        limits = limit, resource.RLIM_INFINITY
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limits)
        left = program.call("GET", "/api/events/1", 1).content["availableTickets"]
        assert (left, program.log.read_bytes()) == (1, held)
        assert program.call(*BOOKING).status == status
        assert program.call(*CANCELLING).status == (503 if status == 503 else 200)
    assert [entry["data"]["id"] for entry in program.entries()] == [1, 2, 3, 1]
    program.process.terminate()
    assert program.process.wait(5) == 0


@posix
def test_kill_9_loses_no_confirmed_booking(program):
    """Eight book until the process is gone; what they were told of is in the log."""
    program.call("POST", "/api/events", 1, {**EVENT, "availableTickets": 10**6})
    confirmed = []

    def book(_):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while len(confirmed) < 200 or program.process.kill() is None:
                confirmed.append(program.call(*BOOKING).content["booking"])

    together(8, book)
    whole = program.log.read_bytes().rpartition(b"\n")[0].splitlines()
    logged = [json.loads(line)["data"] for line in whole]
    assert [data["id"] for data in logged] == list(range(1, len(logged) + 1))
    assert len(confirmed) >= 200
    assert all(booking in logged for booking in confirmed)


@each("held", [b"", b"{}\n", b'{}\n{"event":"boo'])
def test_a_half_line_is_ended_and_whole_ones_are_kept(tmp_path, held):
    """A restart begins at id 1, and the log goes on."""
    (tmp_path / "log").write_bytes(held)
    for _ in "12":
        with whole_server(tmp_path / "log") as site:
            assert site.call("POST", "/api/events", 1, EVENT).content["id"] == 1
            assert site.call(*BOOKING).content["booking"]["id"] == 1
    *kept, first, second, rest = site.log.read_bytes().split(b"\n")
    assert kept == held.splitlines()
    assert json.loads(first)["data"] == json.loads(second)["data"]
    assert rest == b""


@each("trouble", [OSError, ValueError, BrokenPipeError, None])
def test_a_console_that_fails_or_hangs_harms_no_request(tmp_path, trouble):
    go_on = threading.Event()

    def write(_):
        go_on.wait(10)
        if trouble:
            raise trouble

    notifier = eventbook.Notifier(write)
    notifier.start()
    with serving(eventbook.open_store(str(tmp_path / "log"), notifier)) as site:
        site.call("POST", "/api/events", 1, EVENT)
        assert [site.call(*BOOKING).status for _ in "123"] == [201] * 3
    go_on.set()
    notifier.close(5)
    assert not notifier.is_alive()


def test_the_notifier_does_not_wait_for_more():
    """It gathers what comes at about the same time, but is not slow to print."""
    written, begun = [], time.monotonic()
    notifier = eventbook.Notifier(written.append)
    notifier.start()
    notifier.say("one")
    eventually(lambda: written)
    notifier.say("two")
    notifier.close(5)
    assert written == ["one\n", "two\n"]
    assert time.monotonic() - begun < 0.9


def test_the_notifier_writes_whole_lines_in_order():
    written, lines = [], [f"{number}\n" for number in range(1000)]
    notifier = eventbook.Notifier(written.append)
    for line in lines:
        notifier.say(line[:-1])
    notifier.start()
    notifier.close(5)
    assert "".join(written) == "".join(lines)
    assert all(text.endswith("\n") for text in written if text)


# ---- The command line --------------------------------------------------------

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PORT"}
ENVIRONMENT.update(PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")


@pytest.fixture
def launch(tmp_path):
    """launch(*options) starts the program; whatever still runs in the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(*options, program=PROGRAM, shell=(), **environment):
            how = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
            how.update(env={**ENVIRONMENT, **environment}, encoding="utf-8")
            command = [*shell, sys.executable, program, *options]
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


HOSTS_SHOWN = {
    "127.0.0.1": "localhost",
    "": "localhost",
    "127.0.0.10": "127.0.0.10",
    "0.0.0.0": "0.0.0.0",
    "::1": "[::1]",
}


@each("host, shown", HOSTS_SHOWN.items())
def test_the_start_line_holds_the_real_url(launch, host, shown):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        try:
            free.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} is not to be had here")
    process = launch("--host", host, "--port", "0", "--log", "log")
    line = process.stdout.readline()
    found = re.fullmatch(r"eventbook listens on (http://(\S*):\d+)\n", line)
    assert found[2] == shown
    assert opener.open(found[1], timeout=5).status == 200


def test_only_notifications_follow_the_start_line(program):
    program.call("POST", "/api/events", 1, EVENT)
    for step in BOOKING, ("PUT", "/api/events/1", 1), ("GET", "/nowhere"):
        program.call(*step)
    program.talk(b"\0")
    lines = [program.process.stdout.readline() for _ in "12"]
    assert lines[0] == "📧 Booking confirmation email sent for booking 1\n"
    assert lines[1] == "🔔 Event update notification sent to customer 2\n"
    program.process.kill()
    assert program.process.communicate() == ("", "")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_the_option_wins_over_port(launch):
    """So much that a wrong PORT does not matter then."""
    port = free_port()
    assert str(site_of(launch("--log", "log", PORT=port)).port) == port
    for other in port, "x":
        site = site_of(launch("-p", "0", "--log", "log", PORT=other))
        assert str(site.port) != port
        assert site.call("GET", "/").status == 200


USAGE = [("", "--no-such-option"), ("", "extra"), ("", "-p")]
USAGE += [("", "-p", port) for port in "x -1 65536 ٣ 1_0".split()]
USAGE += [("x",), ("65536",), ("3000 ",)]


@each("port, options", [(port, options) for port, *options in USAGE])
def test_a_wrong_option_or_port_exits_with_2(launch, port, options):
    status, stdout, stderr = outcome(launch(*options, PORT=port))
    assert (status, stdout) == (2, "")
    assert stderr.startswith("usage: eventbook.py [-h]")
    assert "Traceback" not in stderr
    assert ("--port" in stderr.splitlines()[-1]) == bool(port or options[0] == "-p")
    assert (": 'x' is no port from 0 to 65535\n" in stderr) == ("x" in (port, *options))


def test_the_highest_port_is_one(launch):
    assert outcome(launch("-p", "65535", "--version"))[0] == 0


@posix
def test_a_port_is_free_again_at_once(launch):
    """Although a connection that the server closed first lingers in TIME_WAIT."""
    port = free_port()
    for _ in "12":
        process = launch("-p", port, "--log", "log")
        site = site_of(process)
        site.talk(request("GET", "/", "Connection: close"), half_close=False)
        process.terminate()
        assert outcome(process) == (0, "", "")


@each("trouble", ["port", "log", "folder", "host", "odd host", "long host"])
def test_trouble_at_the_start_is_one_line_and_exit_1(launch, common, trouble):
    options = {
        "port": ("--log", "log", "-p", str(common.port)),
        "log": ("-p", "0", "--log", "."),
        "folder": ("-p", "0", "--log", os.path.join("none", "log")),
        "host": ("--log", "log", "-p", "0", "--host", "no.such.host.invalid"),
        "odd host": ("--log", "log", "-p", "0", "--host", "a..b"),
        "long host": ("--log", "log", "-p", "0", "--host", "é" * 64),
    }[trouble]
    status, stdout, stderr = outcome(launch(*options), timeout=20)
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    advice = {"log": "cannot write .; name another file with --log ("}
    host = re.escape(options[-1] if "host" in trouble else "127.0.0.1")
    listening = rf"cannot listen on {host}:\d+; try another --port or --host \("
    advice["folder"] = f"cannot write {options[-1]}; name another file with --log ("
    wanted = re.escape(advice[trouble]) if trouble in advice else listening
    assert re.match(f"eventbook: {wanted}", stderr)


def test_help_says_what_it_is_and_how_to_use_it(launch):
    status, stdout, stderr = outcome(launch("--help"))
    assert (status, stderr) == (0, "")
    assert stdout.startswith("eventbook: an event booking backend over HTTP\n\nusage: ")
    wanted = ["-p", "--port", "--host", "--log", "--version", "--help", "curl -H"]
    assert [word for word in wanted if word not in stdout] == []
    users = "1  ORGANIZER", "2  CUSTOMER", "3  CUSTOMER"
    users = "".join(f"  user-id: {user}\n" for user in users)
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    assert stdout.endswith(f"\n\nusers:\n{users}\nexample:\n{example}\n")
    words = "where to listen, 0 for any free port (default: $PORT, or else 3000)"
    assert f" {words}" in (folded := " ".join(stdout.split()))
    assert "--host HOST default: 127.0.0.1 --log FILE default: /" in folded


def test_version(launch):
    assert outcome(launch("--version")) == (0, "eventbook 1.0.0\n", "")


def test_the_log_is_beside_the_program_by_default(launch, tmp_path):
    """Wherever it is started: here a copy of it alone, from another folder."""
    (tmp_path / "home").mkdir()
    program = shutil.copy(PROGRAM, tmp_path / "home")
    for lines in 1, 2:
        log = tmp_path / "home" / "logs" / "events.log.jsonl"
        site = site_of(launch("-p", "0", program=program), log)
        site.call("POST", "/api/events", 1, EVENT)
        site.call(*BOOKING)
        assert len(site.entries()) == lines


def refuses_connections(site):
    try:
        site.connect().close()
    except OSError:
        return True


@posix
@each("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_when_what_has_begun_is_answered(program, name):
    """Nobody new is let in, the idle are dropped, what is queued is printed."""
    program.call("POST", "/api/events", 1, EVENT)
    with program.connect() as idle, program.connect() as half:
        half.sendall(BOOK[:-2])
        program.pause()
        program.process.send_signal(getattr(signal, name))
        assert read_to_end(idle) == []
        eventually(lambda: refuses_connections(program))
        half.sendall(BOOK[-2:])
        (booked,) = read_to_end(half)
        assert (booked.status, booked.fields["connection"]) == (201, "close")
    printed = "📧 Booking confirmation email sent for booking 1\n"
    assert outcome(program.process) == (0, printed, "")


@posix
def test_sigterm_cuts_no_answer_that_is_being_taken(program):
    long_list(program, 4001)
    with program.connect() as client:
        client.sendall(LIST)
        client.recv(1, socket.MSG_PEEK)
        program.pause()
        program.process.terminate()
        eventually(lambda: refuses_connections(program))
        assert len(answer(client).content) == 4001
    assert outcome(program.process) == (0, "", "")


@posix
def test_sigterm_does_not_wait_long_for_stuck_clients(program):
    """Neither for one that takes nothing nor for one that sends half a request, and not
    if it is told again and again."""
    long_list(program)
    with stuck_client(program), program.connect() as half:
        half.sendall(CREATE[:-2])
        program.pause()
        eventually(lambda: program.process.terminate() or program.process.poll() == 0)
        assert outcome(program.process) == (0, "", "")


@posix
def test_a_second_ctrl_c_ends_it_at_once(program):
    with program.connect() as idle, program.connect() as half:
        half.sendall(CREATE[:-2])
        program.pause()
        program.process.send_signal(signal.SIGINT)
        assert read_to_end(idle) == []
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(1) != 0


@posix
def test_a_console_of_any_kind_harms_nothing(launch):
    """Closed from the start (`>&-`), a pipe that breaks, one that knows no emoji."""
    processes = {}
    for console in "closed", "broken", "ascii":
        port, shell = free_port(), ("sh", "-c", 'exec "$@" >&-', "sh")
        how = {"shell": shell} if console == "closed" else {"PYTHONIOENCODING": "ascii"}
        process = processes[console] = launch("-p", port, "--log", console, **how)
        site = Site(int(port))
        eventually(lambda site=site: not refuses_connections(site))
        if console == "broken":
            process.stdout.close()
        site.call("POST", "/api/events", 1, EVENT)
        assert [site.call(*BOOKING).status for _ in "123"] == [201] * 3
        process.terminate()
    ends = [(one.wait(5), one.stderr.read()) for one in processes.values()]
    assert ends == [(0, "")] * 3
    printed = processes["ascii"].stdout.read()
    assert " Booking confirmation email sent for booking 3\n" in printed


def test_a_console_that_takes_nothing_does_not_hold_up_the_end():
    go_on = threading.Event()
    notifier = eventbook.Notifier(lambda _: go_on.wait(10))
    notifier.start()
    notifier.say("x")
    notifier.close(0.05)
    assert notifier.is_alive()
    assert notifier.daemon  # so the process ends without it
    go_on.set()
    notifier.join(5)


NEVER_WAITS = """
import eventbook, os, sys, time
os.set_blocking(1, False)
begun, work = time.monotonic(), time.process_time()
eventbook.console()("x" * 200_000)
print(time.monotonic() - begun, time.process_time() - work, file=sys.stderr)
"""


@posix
def test_a_console_that_never_waits_is_waited_for(launch):
    """The pipe holds a third; who reads it comes later. Little is done meanwhile."""
    process = launch(NEVER_WAITS, program="-c", PYTHONPATH=HERE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.4)
    status, printed, told = outcome(process)
    seconds, work = map(float, told.split())
    assert (status, len(printed)) == (0, 200_000)
    assert (seconds < 1, work < 0.1) == (True, True)


@posix
def test_what_is_queued_in_the_end_is_printed(program):
    """4,000 lines, of which the pipe holds a third, over Ctrl-Z, fg and Ctrl-C."""
    program.call("POST", "/api/events", 1, {**EVENT, "availableTickets": 5000})
    assert statuses(program.talk(BOOK * 4000)) == [201] * 4000
    for name in "SIGSTOP", "SIGCONT", "SIGINT":
        program.process.send_signal(getattr(signal, name))
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.5)
    status, printed, trouble = outcome(program.process)
    assert (status, printed.count("📧"), trouble) == (0, 4000, "")


@linux
def test_running_out_of_descriptors_makes_room(program):
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (32, 32))
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(program.connect())
        assert program.call("GET", "/").status == 200
    program.process.terminate()
    assert outcome(program.process) == (0, "", "")


# ---- The README --------------------------------------------------------------
# What its session, its routes and its limits claim, something runs.


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def session():
    """[(command, output)] of the curl session that the README shows."""
    blocks = re.findall(r"^```console\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    steps = re.split(r"^\$ ", "".join(blocks).replace("\\\n", " "), flags=re.MULTILINE)
    return [step.partition("\n")[::2] for step in steps if step.startswith("curl")]


def masked(output):
    """The lines of an output without what differs from run to run."""
    for changing in "(?<=ETag: ).*", "(?<=Date: ).*", '(?<="timestamp":")[^"]*':
        output = re.sub(changing, "...", output.replace("\r", ""), flags=re.IGNORECASE)
    return [line.rstrip() for line in output.splitlines() if line.strip()]


@posix
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_session_in_the_readme_is_what_happens(program):
    steps = session()
    assert len(steps) >= 5
    for command, shown in steps:
        command = command.replace("localhost:3000", f"127.0.0.1:{program.port}")
        output = subprocess.check_output(["sh", "-c", f"{command} 2>/dev/null"])
        assert masked(output.decode()) == masked(shown), command
    program.process.terminate()
    (printed,) = re.findall(r"^```text\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    assert outcome(program.process) == (0, printed, "")


def test_the_routes_in_the_readme_are_the_codes():
    found = re.findall(r"^\| *`([A-Z]+) (/\S*)` *\|([^|]*)\|", readme(), re.MULTILINE)
    shown = []
    for method, path, cell in found:
        either = re.search("both|either", cell)
        roles = [role for role in (ORGANIZER, CUSTOMER) if role in cell or either]
        shown.append((method, path, roles))
    assert sorted(shown) == sorted((*one[:2], list(one[2])) for one in eventbook.ROUTES)


def test_the_limits_in_the_readme_are_the_codes():
    limits, server = eventbook, eventbook.Server
    sizes = limits.LINE_LIMIT, limits.HEADER_LIMIT, limits.CONTENT_LIMIT
    assert (*sizes, limits.FIELDS_LIMIT) == (8192, 16384, 65536, 100)
    assert (server.request_time, server.answer_time) == (15, 15)
    assert (server.linger_time, server.grace_time) == (2, 2)
    assert server.connection_limit == 512 or os.name != "posix"
    figures = "8 KiB|16 KiB|64 KiB|100|15 s|2 s|512".split("|")
    assert [one for one in figures if not re.search(rf"\b{one}\b", readme())] == []
