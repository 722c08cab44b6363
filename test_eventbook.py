"""The tests of eventbook: its contract, put to a real server on a free port.

    python -m pytest -q                  # all of them, in some 15 seconds
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

import pytest

import eventbook

each = pytest.mark.parametrize
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and descriptors")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own calls")

# ---- The language ------------------------------------------------------------
# A Site is a running server, in a thread or in a process, and the ways to speak to it.

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "eventbook.py")
EVENT = {"title": "Tech Conference 2026", "date": "2026-02-15", "availableTickets": 3}
DENIED, UNAUTHORIZED = {"error": "Access denied"}, {"error": "Unauthorized"}
NO_EVENT, NO_BOOKING = {"error": "Event not found"}, {"error": "Booking not found"}
SOLD_OUT = {"error": "Booking failed: sold out"}
CREATING = ("POST", "/api/events", 1, EVENT)
BOOKING = ("POST", "/api/events/1/book", 2)
CANCELLING = ("DELETE", "/api/bookings/1", 2)
UPDATING, READING = ("PUT", "/api/events/1", 1), ("GET", "/api/events/1", 1)

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

    def logged(self):
        """The ids of the bookings that the log tells of, line by line."""
        return [entry["data"]["id"] for entry in self.entries()]

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


def together(number, work):
    """The results of work(0), work(1), ... in so many threads at the same moment, which
    are switched as often as can be."""
    barrier, interval = threading.Barrier(number), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(number, initializer=barrier.wait) as pool:
            return list(pool.map(work, range(number)))
    finally:
        sys.setswitchinterval(interval)


@contextlib.contextmanager
def serving(store, server_class=eventbook.Server, **more):
    """A Site whose server runs in a thread; no thread is left of it in the end."""
    threads = threading.active_count()
    server = server_class(("127.0.0.1", 0), store)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        site = Site(server.server_address[1], **more)
        site.server = server
        yield site
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        eventually(lambda: threading.active_count() <= threads)


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
        site.call("POST", "/api/events", 1, {**EVENT, "availableTickets": 1})
        site.call(*BOOKING)
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
ORDER = [  # most are wrong in several ways; the first in the contract's order wins
    (411, "", "BREW", "/nowhere", None, None, {"Transfer_Encoding": "x"}),
    (413, "", "BREW", "/nowhere", None, b"[" * 100_000, {}),
    (501, "", "BREW", "/nowhere", None, b"!", {}),
    (404, "Not found", "PATCH", "/nowhere", None, b"!", {}),
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
def test_a_method_that_a_path_has_not_is_refused_with_those_it_has(common, path):
    """Of anybody, also with one "/" behind; CORS's OPTIONS is no exception."""
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
    "date": [None, 20260215, [], "", " 2026-02-15", "2026-02-15\n", "2026-02-15 19:30"]
    + "2026-02-30 2026-13-01 2026-2-15 20260215 2026-W07-7 0000-01-01".split()
    + "２０２６-02-15 2026-02-15T 2026-02-15T24:00 2026-02-15T19 2026-02-15T19:60".split()
    + "2026-02-15T19:30:60 2026-02-15T19:30+25:00 2026-02-15t19:30 2026-046".split()
    + "15.02.2026 tomorrow 2026-02-15Z 2026-02-15T19:30+0100 2025-02-29".split()
    + "2026-02-15T19:30:00. 2026-02-15T19:30:00,5 2026-02-15T19:30.5".split()
    + ["2026-02-15T19:30:00." + "1" * 10],
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
    + "2026-02-15T19:30:00-11:00 2026-02-15T19:30:00.000Z".split()
    + "2026-02-15T19:30:00.1 2026-02-15T19:30:00.123456789+01:00".split(),
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
    for value in 2, True, "1":
        refused = common.call(*UPDATING, {"title": "New", name: value})
        assert (refused.status, list(refused.content["details"])) == (400, [name])
    assert common.call(*READING).content["title"] == EVENT["title"]


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


UNREADABLE = "not in UTF-8, nested too deep, or a number out of range"
HOSTILE = {
    "invalid UTF-8": (b'{"title":"\xff"}', UNREADABLE),
    "overlong UTF-8": (b'{"title":"\xc0\xaf"}', UNREADABLE),
    "UTF-8 surrogate": (b'{"title":"\xed\xa0\x80"}', UNREADABLE),
    "UTF-16": (BODY.decode().encode("utf-16"), UNREADABLE),
    "UTF-32": (BODY.decode().encode("utf-32-le"), "Expecting property name"),
    "NaN": (b'{"availableTickets":NaN}', UNREADABLE),
    "Infinity": (b'{"availableTickets":Infinity}', UNREADABLE),
    "minus Infinity": (b'{"x":[{"y":-Infinity}]}', UNREADABLE),
    "1e400": (b'{"x":1e400}', UNREADABLE),
    "lone surrogate": (b'{"title":"\\ud800"}', UNREADABLE),
    "lone surrogate in a key": (b'{"\\udfff":1}', UNREADABLE),
    "deep array": (b"[" * 30_000 + b"]" * 30_000, UNREADABLE),
    "deep object": (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, UNREADABLE),
    "deep and open": (b"[" * 65_536, UNREADABLE),
    "5,000 digits": (b'{"availableTickets":' + b"9" * 5000 + b"}", ""),
    "array": (b"[" + BODY + b"]", "an object is wanted"),
    "text": (b'"x"', "an object is wanted"),
    "number": (b"1", "an object is wanted"),
    "null": (b"null", "an object is wanted"),
    "blank": (b" \r\n", "Expecting value"),
    "cut": (BODY[:-1], ""),
    "garbage behind": (BODY + b"x", "Extra data"),
    "single quotes": (b"{'title':'x'}", "Expecting property name"),
    "trailing comma": (b'{"title":"x",}', ""),
    "control character": (b'{"title":"\n"}', "Invalid control character"),
    "form": (b"title=x&date=2026-02-15&availableTickets=3", "Expecting value"),
    "NUL": (b"\0", "Expecting value"),
    "mark inside": (b'{\xef\xbb\xbf"title":"x"}', "Expecting property name"),
}


@each("body, problem", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_a_bad_request(common, body, problem):
    """In words for a client: none of Python's codecs, none of its advice."""
    for method, path in ("POST", "/api/events"), ("PUT", "/api/events/1"):
        refused = common.call(method, path, 1, body)
        assert refused.status == 400
        assert refused.content["error"].startswith(f"Invalid JSON: {problem}")
        assert not re.search("codec|utf-8-sig|sys[.]", refused.content["error"])


def test_a_byte_order_mark_is_ignored(call, event):
    """RFC 8259, section 8.1: editors and PowerShell write one."""
    marked = "\ufeff".encode() + BODY
    assert call("POST", "/api/events", 1, marked)[:2] == (201, {"id": 2, **EVENT})
    for body in marked, "\ufeff".encode():
        assert call(*UPDATING, body).content["event"] == event


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
            "id": "the id in the path",
            "x": "no field of this name is known",
        },
    ),
    (
        ("GET", "/api/events?limit=0&offset=-1&available=", 2),
        {
            "limit": "an integer from 1 to 1,000",
            "offset": "an integer from 0 to inf",
            "available": "true or false",
        },
    ),
]


@each("step, details", ADVICE)
def test_each_bad_value_is_named_with_what_would_be_right(common, step, details):
    refused = common.call(*step)
    assert refused.content == {"error": "Validation failed", "details": details}


# ---- Retries and preconditions -----------------------------------------------


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
    call(*CREATING)
    assert call(*BOOKING, Idempotency_Key="k").status == 201
    assert call("POST", "/api/events/2/book", 2, Idempotency_Key="k").status == 422
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


def test_the_newest_ten_thousand_keys_are_remembered(server, call):
    """All are sent on one connection, then the second and the first once more."""
    call("POST", "/api/events", 1, {**EVENT, "availableTickets": 20_000})
    path, keys = "/api/events/1/book", [*range(10_001), 1, 0]
    asked = [request("POST", path, f"Idempotency-Key: {key}", user=2) for key in keys]
    found = server.talk(b"".join(asked[:-2])) + server.talk(b"".join(asked[-2:]))
    ids = [json.loads(one.content)["booking"]["id"] for one in found]
    assert ids == [*range(1, 10_002), 2, 10_002]


CHANGES = [
    (*UPDATING, {"title": "New"}),
    (*UPDATING, {"availableTickets": 9}),
    BOOKING,
    CANCELLING,
    (*UPDATING, EVENT),
]


def test_the_etag_changes_with_the_event_and_never_comes_back(call, event):
    """Though the event does, and not in another run either; else it stays."""
    with serving(eventbook.Store()) as another:
        tags = [another.call(*CREATING).fields["etag"]]
    for change in CHANGES:
        tags.append(call(*READING).fields["etag"])
        call(*CREATING)
        assert call(*UPDATING, {}).fields["etag"] == tags[-1]
        assert call(*change).status in (200, 201)
    tags.append(call(*READING).fields["etag"])
    assert len(set(tags)) == 7
    assert all(re.fullmatch(r'"[0-9a-f]{12}-\d+"', tag) for tag in tags)


PRECONDITIONS = [  # what a field says, T being the current tag; for PUT, for GET
    ("If-Match", "T", 200, 200),
    ("If-Match", "*", 200, 200),
    ("If-Match", '"old", T', 200, 200),
    ("If-Match", '"old"', 412, 412),
    ("If-Match", '"old", W/"older"', 412, 412),
    ("If-Match", "W/T", 412, 412),
    ("If-Match", '"*"', 412, 412),
    ("If-Match", "x", 412, 412),
    ("If-Match", "", 412, 412),
    ("If-None-Match", "T", 412, 304),
    ("If-None-Match", "*", 412, 304),
    ("If-None-Match", '"old",T', 412, 304),
    ("If-None-Match", 'W/"old", W/T', 412, 304),
    ("If-None-Match", '"old"', 200, 200),
    ("If-None-Match", '"*"', 200, 200),
    ("If-None-Match", "x", 200, 200),
    ("If-None-Match", "", 200, 200),
]


@each("name, value, put, got", PRECONDITIONS)
def test_preconditions(server, call, event, name, value, put, got):
    """RFC 9110, section 13. A refusal names the current tag and changes nothing."""
    tag = call(*READING).fields["etag"]
    field = f"{name}: {value.replace('T', tag)}"
    for method, status in ("GET", got), ("HEAD", got), ("PUT", put):
        body = b'{"title":"New"}' * (method == "PUT")
        (found,) = server.talk(request(method, READING[1], field, user=1, body=body))
        assert found.status == status
        assert (found.fields["etag"] == tag) == (method != "PUT" or put == 412)
        assert ("content-length" in found.fields) == (status != 304)
    assert call(*READING).content["title"] == ("New" if put == 200 else EVENT["title"])
    assert len(server.printed()) == 0


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
            client.shutdown(socket.SHUT_WR)
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
    """Each answer is the model's; the log replays to exactly the live bookings."""
    chance, model = random.Random(seed), Model()
    for _ in range(300):
        verb, id, user, body = random_step(chance, model)
        method, path, _ = VERBS[verb]
        status, content, _ = call(method, path.format(id), user, body)
        assert (status, content) == getattr(model, verb)(id, user, body)
    assert live_bookings(server.entries()) == model.bookings
    own = [one for user in (2, 3) for one in call("GET", "/api/bookings", user).content]
    assert {one["id"]: one for one in own} == model.bookings


# ---- Races -------------------------------------------------------------------
# Many clients over real connections. With the store's lock taken away they all fail.


@each("seed", range(3))
def test_a_random_history_of_many_clients_is_one_that_the_model_can_have(
    server, call, seed
):
    """The log says in which order; replayed in that order, the model makes the same
    bookings, and ends with the same events. What was confirmed is what was logged."""
    model, confirmed = Model(), []
    for tickets in 3, 5, 8:
        model.create(
            0, 1, call(*CREATING[:3], {**EVENT, "availableTickets": tickets}).content
        )

    def act(number):
        chance = random.Random(f"{seed} {number}")
        for _ in range(40):
            user, event, booking = (
                2 + number % 2,
                chance.randint(1, 3),
                chance.randint(1, 60),
            )
            booked = call("POST", f"/api/events/{event}/book", user)
            cancelled = call("DELETE", f"/api/bookings/{booking}", user)
            done = [one for one in (booked, cancelled) if one.status < 300]
            confirmed.extend(one.content["booking"] for one in done)

    together(12, act)
    for entry in server.entries():
        id, event, user = entry["data"].values()
        verb = "book" if entry["event"] == "booking.created" else "cancel"
        status, told = getattr(model, verb)(event if verb == "book" else id, user, None)
        assert (status < 300, told.get("booking")) == (True, entry["data"])
    assert list(model.events.values()) == call("GET", "/api/events", 2).content
    by_id = [sorted(one.values()) for one in confirmed]
    assert sorted(by_id) == sorted(
        sorted(one["data"].values()) for one in server.entries()
    )


def test_64_threads_get_exactly_the_200_tickets_there_are(server, call, event):
    """No ticket twice, none left, and the log in the order of the ids."""
    call(*UPDATING, {"availableTickets": 200})

    def book(number):
        path, user = "/api/events/1/book", 2 + number % 2
        booked = iter(lambda: call("POST", path, user)[:2], (400, SOLD_OUT))
        return [content["booking"]["id"] for status, content in booked]

    made = [booking for mine in together(64, book) for booking in mine]
    assert sorted(made) == server.logged() == list(range(1, 201))
    assert call(*READING).content["availableTickets"] == 0
    assert len(server.printed()) == 200


def test_of_many_who_cancel_a_booking_one_does(server, call, event):
    """And frees one ticket, of which there is one line."""
    for number in range(1, 9):
        assert call(*BOOKING).status == 201
        path = f"/api/bookings/{number}"
        made = together(8, lambda _, path=path: call("DELETE", path, 2).status)
        assert sorted(made) == [200] + [404] * 7
    assert call(*READING).content == event
    assert server.logged() == [number for number in range(1, 9) for _ in "12"]


def test_many_with_one_key_make_one_booking(server, call, event):
    for key, left in ("a", 2), ("b", 1), ("c", 0):
        made = together(16, lambda _, key=key: call(*BOOKING, Idempotency_Key=key)[:2])
        assert made[0][0] == 201
        assert made == [made[0]] * 16
        assert call(*READING).content["availableTickets"] == left
    assert server.logged() == [1, 2, 3]
    assert len(server.printed()) == 3


def test_of_many_with_one_etag_one_updates(call, event):
    tag = call(*READING).fields["etag"]
    body = [{"title": str(number)} for number in range(32)]
    made = together(32, lambda number: call(*UPDATING, body[number], If_Match=tag))
    made.sort(key=lambda one: one.status)
    assert statuses(made) == [200] + [412] * 31
    assert call(*READING).content == made[0].content["event"]


def test_no_update_is_lost(call, event):
    """Eight count up in the title: they read, add one and put it back with If-Match."""
    call(*UPDATING, {"title": "0"})

    def count(_):
        status = 412
        while status == 412:
            read = call(*READING)
            body = {"title": str(int(read.content["title"]) + 1)}
            status = call(*UPDATING, body, If_Match=read.fields["etag"]).status

    together(8, count)
    assert call(*READING).content["title"] == "8"


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
    b"GET / HTTP/1.1\nHost: a\n\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\n\n": 400,
    b"GET / HTTP/1.1\rHost: a\r\r\n\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\xff\r\n\r\n": 400,
    b"\r\n\r\n" + GET: 400,
    bytes(range(256)): 400,
    b"\0" * 100 + b"\n": 400,
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


def of_size(line, header):
    """A request whose request line and field lines have so many octets."""
    line = "GET /?" + "x" * (line - len("GET /? HTTP/1.1")) + " HTTP/1.1\r\n"
    return (
        f"{line}Host: a\r\nX: {'x' * (header - len('Host: a..X: ..'))}\r\n\r\n".encode()
    )


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
        request("GET", "/", *["X: 1"] * 2000),
        of_size(8192, 99),
        of_size(99, 16384),
        of_size(8192, 16384),
        request("GET", "/", body=b" " * 65536),
    ],
    (200,): [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
        request("GET", "/", "Connection: close"),
        request("GET", "/", "Connection: x ,\tClose ,"),
        request("GET", "/", KEEP, "Connection: close"),
        request("GET", "/", "Connection: close", KEEP),
    ],
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
SAID = {  # what a refusal tells a person
    b"GET /\r\n\r\n": "Malformed request line",
    of_size(8193, 99): "Request line too long",
    b"x" * 70_000 + b"\n": "Request-URI Too Long|URI Too Long",
    of_size(99, 16385): "Header too large",
    b"GET / HTTP/2.0\r\n\r\n": "HTTP/1.0 and HTTP/1.1 are spoken here",
    b"GET / HTTP/1.1\r\n\r\n": "Exactly one valid Host is needed",
    request("GET", "/", " X: 1"): "Malformed field line, or cut short",
    request("GET", "a"): "Invalid request target",
    request("GET", "/", "Content-Length: x"): "Invalid Content-Length",
    request("GET", "/", "Content-Length: 65537"): "Content too large",
    request("GET", "/", "Content-Length: 9"): "Content cut short",
    request("GET", "/", "Transfer-Encoding: x"): "No Transfer-Encoding is taken",
    request("BREW", "/"): "Not Implemented",
    request("PUT", "/"): "Method not allowed",
    request("PUT", "/api/events/1", "If-Match: x", user=1): "Event has changed",
    request(
        "PUT", "/api/events/1", "If-None-Match: *", user=1
    ): "Event has not changed",
}


@each("octets, text", SAID.items(), ids=lambda case: ascii(case)[2:62])
def test_a_refusal_says_what_is_wrong(common, octets, text):
    (refused,) = common.talk(octets)
    assert re.fullmatch(text, json.loads(refused.content)["error"])


ALL = [
    (octets, expected)
    for expected in CONVERSATIONS
    for octets in CONVERSATIONS[expected]
]


@each("octets, expected", ALL, ids=lambda case: ascii(case)[:60])
def test_a_conversation_goes_on_or_is_closed(common, octets, expected):
    """An answer that keeps the connection says for how long, less a second."""
    found = common.talk(octets + GET, half_close=len(expected) == 2)
    assert statuses(found) == list(expected)
    for one in found:
        closes = len(expected) == 1
        assert one.fields.get("connection") == ("close" if closes else None)
        assert one.fields.get("keep-alive") == (None if closes else "timeout=15")
        check_standing_fields(one)


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
            assert statuses(server.talk(octets[:at])) in ([], [400]), at
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


STATES = {
    "idle": b"",
    "half a head": CREATE[:20],
    "half a body": CREATE[:-9],
    "just asked": LIST,
    "refused": b"\0\n",
    "refused with more to come": b"\0\n" * 50_000,
    "not reading": LIST * 80,
}


@each("octets", STATES.values(), ids=STATES)
def test_a_client_that_vanishes_leaves_nothing_behind(server, call, octets):
    """Ten reset their connections; none is open after that, and all threads are free."""
    long_list(server)
    for _ in range(10):
        client = server.connect()
        client.sendall(octets)
        server.pause()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    eventually(lambda: not server.server.deadlines)
    assert call("GET", "/api/events", 2).status == 200


class Hasty(eventbook.Server):
    patience = 0.3


@pytest.fixture
def hasty(tmp_path):
    """A server whose patience is short."""
    with whole_server(tmp_path / "log", Hasty) as site:
        yield site


def test_a_client_that_never_reads_is_closed_and_holds_up_nobody(hasty):
    long_list(hasty)
    with stuck_client(hasty) as client:
        assert hasty.call("GET", "/api/events", 2).status == 200
        eventually(lambda: not hasty.server.deadlines)
        with contextlib.suppress(ConnectionResetError):
            assert len(read_to_end(client)) < 80


def test_a_client_that_reads_late_gets_all_of_it(server):
    long_list(server)
    with stuck_client(server) as client:
        client.shutdown(socket.SHUT_WR)
        assert statuses(read_to_end(client)) == [200] * 80


@each("octets", [CREATE * 9, b"\0\n"], ids=["asking", "refused"])
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


@each("octets, expected", [(b"", []), (CREATE[:-1], [400]), (GET, [200])])
def test_an_idle_client_is_closed(hasty, octets, expected):
    """No sooner than its time is over, which an answer begins anew."""
    with hasty.connect() as client:
        begun = time.monotonic()
        client.sendall(octets)
        assert statuses(read_to_end(client)) in (expected, [])
        assert time.monotonic() - begun > 0.25


def test_a_request_that_takes_long_is_no_idle_client():
    """Its client waits for the server, not the server for its client."""
    store, pause = eventbook.Store(), threading.Event()
    store.on("event.updated", lambda *_: pause.wait(1))
    with serving(store, Hasty) as site:
        site.call(*CREATING)
        assert site.call(*UPDATING).status == 200


class Small(eventbook.Server):
    connection_limit = 2


@pytest.fixture
def small(tmp_path):
    """A server with room for two."""
    with whole_server(tmp_path / "log", Small) as site:
        yield site


def test_each_open_connection_has_a_thread(server):
    with contextlib.ExitStack() as stack:
        before = threading.active_count()
        for _ in range(40):
            stack.enter_context(server.connect())
        server.pause()
        assert threading.active_count() - before >= 40


def test_the_longest_idle_makes_room(small):
    """The first to come has spoken since; so it is the second that is closed."""
    with small.connect() as first, small.connect() as second:
        for client in first, second, first:
            client.sendall(GET)
            assert answer(client).status == 200
        with small.connect() as third:
            assert second.recv(1) == b""
            for client in third, first:
                client.sendall(GET)
                assert answer(client).status == 200


def test_slow_clients_shut_nobody_out(small):
    """However many there are, and though none of them is overdue."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(small.connect()).sendall(CREATE[:20])
        for _ in range(10):
            assert small.call("GET", "/").status == 200


def test_who_is_at_work_makes_no_room():
    """Both that fill the server wait for an answer: it is the newcomer that goes."""
    store, busy, go_on = eventbook.Store(), [], threading.Event()
    store.on("event.updated", lambda *_: busy.append(1) or go_on.wait(10))
    store.lock = contextlib.nullcontext()
    with serving(store, Small) as site, site.connect() as one, site.connect() as two:
        store.create(eventbook.Request("", {}, BODY, None, 1))
        for client in one, two:
            client.sendall(request("PUT", "/api/events/1", user=1))
        eventually(lambda: len(busy) == 2)
        assert site.talk(GET, half_close=False) == []
        go_on.set()
        assert [answer(client).status for client in (one, two)] == [200, 200]


@each("octets", [request("GET", "/", "X : 1"), request("BREW", "/"), b"\n"])
def test_a_refusal_can_be_read_by_a_client_that_still_sends(server, octets):
    """Closing with unread input would reset the connection and take the answer back."""
    (refused,) = server.talk(octets + b"x" * 1_000_000)
    assert refused.status in (400, 501)


def test_a_refused_client_may_take_its_time(server):
    with server.connect() as client:
        client.sendall(b"\0\n")
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
        eventually(lambda: not site.server.deadlines)
        assert (told, capsys.readouterr().err.count("ZeroDivisionError")) == ([], 1)
        faulty.clear()
        assert (site.call(*step).status < 300, told) == (True, [name])


class Exhausted(eventbook.Server):
    """Has no descriptor for the first three connections."""

    lacking = 3

    def get_request(self):
        self.lacking -= 1
        if self.lacking >= 0:
            raise OSError("Too many open files")
        return super().get_request()


def test_out_of_descriptors_it_goes_on():
    with serving(eventbook.Store(), Exhausted) as site:
        assert site.call("GET", "/").status == 200


@posix
def test_what_has_arrived_when_it_is_stopped_is_answered():
    """Also of those that stand in the queue, and all of it; the idle are dropped."""
    with contextlib.ExitStack() as stack:
        with serving(eventbook.Store()) as site:
            idle = stack.enter_context(site.connect())
            idle.sendall(GET)
            assert answer(idle).status == 200
            site.server.shutdown()
            clients = [stack.enter_context(site.connect()) for _ in range(99)]
            for client in clients:
                client.sendall(GET * 3)
        assert idle.recv(1) == b""
        for client in clients:
            assert statuses(read_to_end(client)) == [200] * 3


class Short(eventbook.Server):
    grace = 0.1


def test_stuck_clients_do_not_hold_up_the_end(tmp_path):
    with contextlib.ExitStack() as stack:
        with whole_server(tmp_path / "log", Short) as site:
            long_list(site)
            for _ in range(9):
                stack.enter_context(stuck_client(site))
                stack.enter_context(site.connect()).sendall(CREATE[:-2])
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_logged_does_not_happen():
    with whole_server("/dev/full") as site:
        event = site.call(*CREATING).content
        refused = site.call(*BOOKING, Idempotency_Key="k")
        assert refused[:2] == (503, {"error": "The log cannot be written"})
        assert int(refused.fields["retry-after"]) > 0
        assert site.call(*READING).content == event
        assert site.call("GET", "/api/bookings", 2).content == []
        assert site.printed() == []


@linux
def test_a_full_disk_leaves_whole_lines_until_there_is_room_again(program):
    """The limit cuts the third line in the middle, and a cancelling too."""
    import resource

    program.call(*CREATING)
    assert [program.call(*BOOKING).status for _ in "12"] == [201, 201]
    held = program.log.read_bytes()
    for limit, status in (len(held) + 40, 503), (resource.RLIM_INFINITY, 201):
        limits = limit, resource.RLIM_INFINITY
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limits)
        left = program.call(*READING).content["availableTickets"]
        assert (left, program.log.read_bytes()) == (1, held)
        assert program.call(*BOOKING).status == status
        assert program.call(*CANCELLING).status == (503 if status == 503 else 200)
    assert program.logged() == [1, 2, 3, 1]


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


MOVES = {
    "renamed": lambda log: log.rename(f"{log}.1"),
    "removed": os.remove,
    "replaced": lambda log: (
        shutil.copy(log, f"{log}.1") and os.replace(f"{log}.1", log)
    ),
    "truncated": lambda log: os.truncate(log, 0),
    "cut in a line": lambda log: os.truncate(log, log.stat().st_size - 5),
    "appended to": lambda log: log.open("a").write("x"),
}
LEFT = {"replaced": 1, "cut in a line": 1, "appended to": 2}


@each("move", MOVES)
def test_the_log_is_at_its_path(server, call, event, move):
    """Whatever is done to the file, the next line is there, and a line of its own."""
    call(*BOOKING)
    MOVES[move](server.log)
    assert [call(*BOOKING).status for _ in "12"] == [201, 201]
    *left, second, third, rest = server.log.read_bytes().split(b"\n")
    assert [json.loads(line)["data"]["id"] for line in (second, third)] == [2, 3]
    assert (len(left), rest) == (LEFT.get(move, 0), b"")


def test_without_its_folder_the_log_takes_nothing(tmp_path):
    (tmp_path / "logs").mkdir()
    with whole_server(tmp_path / "logs" / "log") as site:
        event = site.call(*CREATING).content
        shutil.rmtree(tmp_path / "logs")
        assert site.call(*BOOKING).status == 503
        assert site.call(*READING).content == event
        (tmp_path / "logs").mkdir()
        assert site.call(*BOOKING).status == 201
        assert site.logged() == [1]


@each("trouble", [OSError, ValueError, None])
def test_a_console_that_fails_or_hangs_harms_no_request(tmp_path, trouble):
    go_on = threading.Event()

    def write(_):
        go_on.wait(10)
        if trouble:
            raise trouble

    notifier = eventbook.Notifier(write)
    notifier.start()
    with serving(eventbook.open_store(str(tmp_path / "log"), notifier)) as site:
        site.call(*CREATING)
        assert [site.call(*BOOKING).status for _ in "123"] == [201] * 3
    notifier.close(0.05)
    assert notifier.is_alive()
    assert notifier.daemon  # so the process can end without it
    go_on.set()
    notifier.join(5)


def test_the_notifier_writes_whole_lines_in_order_and_does_not_wait_for_more():
    written, lines = [], [f"{number}\n" for number in range(1000)]
    notifier = eventbook.Notifier(written.append)
    notifier.start()
    for line in lines:
        notifier.say(line[:-1])
    eventually(lambda: "".join(written) == "".join(lines))
    notifier.close(5)
    assert all(text.endswith("\n") for text in written if text)


# ---- The command line --------------------------------------------------------

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PORT"}
ENVIRONMENT.update(PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")
CLOSED = ("sh", "-c", 'exec "$@" >&-', "sh")  # without a stdout
NOHUP = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")


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
    for step in CREATING, BOOKING, UPDATING, ("GET", "/nowhere"):
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
        assert str(site_of(launch("-p", "0", "--log", "log", PORT=other)).port) != port


USAGE = [("", "--no-such-option"), ("", "extra"), ("", "-p")]
USAGE += [("", "-p", port) for port in "x -1 65536 ٣ 1_0".split()]
USAGE += [("x",), ("65536",), ("3000 ",)]


@each("port, options", [(port, options) for port, *options in USAGE])
def test_a_wrong_option_or_port_exits_with_2(launch, port, options):
    status, stdout, stderr = outcome(launch(*options, PORT=port))
    assert (status, stdout) == (2, "")
    assert stderr.startswith("usage: eventbook.py [-h]")
    assert ("--port" in stderr.splitlines()[-1]) == bool(port or options[0] == "-p")
    assert (": 'x' is no port from 0 to 65535\n" in stderr) == ("x" in (port, *options))


def test_the_highest_port_is_one(launch):
    assert outcome(launch("-p", "65535", "--version")) == (0, "eventbook 1.0.0\n", "")


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


TROUBLE = {  # options, and what stderr says then
    "port": (("-p", "{port}"), "cannot listen on 127.0.0.1:{port}; try another --port"),
    "log": (("--log", "."), "cannot write .; name another file with --log ("),
    "folder": (
        ("--log", "no/log"),
        "cannot write no/log; name another file with --log (",
    ),
    "host": (
        ("--host", "no.such.host.invalid"),
        "cannot listen on no.such.host.invalid:",
    ),
    "odd host": (("--host", "a..b"), "cannot listen on a..b:0; try another --port or"),
    "long host": (("--host", "é" * 64), "cannot listen on éééé"),
}


@each("options, advice", TROUBLE.values(), ids=TROUBLE)
def test_trouble_at_the_start_is_one_line_and_exit_1(launch, common, options, advice):
    options = [option.format(port=common.port) for option in options]
    process = launch("--log", "log", "-p", "0", *options)
    status, stdout, stderr = outcome(process, timeout=20)
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("eventbook: " + advice.format(port=common.port))


def test_help_says_what_it_is_and_how_to_use_it(launch):
    status, stdout, stderr = outcome(launch("--help"))
    assert (status, stderr) == (0, "")
    assert "\n\neventbook: an event booking backend over HTTP\n\n" in stdout
    wanted = ["-p", "--port", "--host", "--log", "--version", "--help", "curl -H"]
    assert [word for word in wanted if word not in stdout] == []
    users = "1  ORGANIZER", "2  CUSTOMER", "3  CUSTOMER"
    users = "".join(f"  user-id: {user}\n" for user in users)
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    assert stdout.endswith(f"\n\nusers:\n{users}\nexample:\n{example}\n")
    words = "where to listen, 0 for any free port (default: $PORT, or else 3000)"
    assert f" {words}" in (folded := " ".join(stdout.split()))
    assert "--host HOST default: 127.0.0.1 --log FILE default: /" in folded


def test_the_log_is_beside_the_program_by_default(launch, tmp_path):
    """Wherever it is started: here a copy of it alone, from another folder."""
    (tmp_path / "home").mkdir()
    program = shutil.copy(PROGRAM, tmp_path / "home")
    for lines in 1, 2:
        log = tmp_path / "home" / "logs" / "events.log.jsonl"
        site = site_of(launch("-p", "0", program=program), log)
        site.call(*CREATING)
        site.call(*BOOKING)
        assert len(site.entries()) == lines


@linux
def test_it_keeps_to_one_processor_of_those_it_may_use(program):
    (kept,) = os.sched_getaffinity(program.process.pid)
    assert kept in os.sched_getaffinity(0)


@posix
@each("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_it_when_what_has_arrived_is_answered(launch, tmp_path, name):
    """Whoever reads late is not cut off, the idle are, what is queued is printed, and
    nothing is left open that Python would warn of."""
    log = str(tmp_path / "log")
    strict = ("-X", "dev", "-W", "error")
    program = site_of(launch("-p", "0", "--log", log, flags=strict))
    long_list(program, 4001)
    with program.connect() as late, program.connect() as idle:
        late.sendall(LIST + BOOK)
        late.recv(1, socket.MSG_PEEK)
        program.pause()
        program.process.send_signal(getattr(signal, name))
        assert read_to_end(idle) == []
        with pytest.raises(OSError):
            program.connect()
        listed, booked = read_to_end(late)
        assert (len(json.loads(listed.content)), booked.status) == (4001, 201)
    printed = "📧 Booking confirmation email sent for booking 1\n"
    assert outcome(program.process) == (0, printed, "")


@posix
def test_a_hang_up_that_was_ignored_at_the_start_is_ignored(launch):
    """As under nohup: the terminal may go."""
    site = site_of(launch("-p", "0", "--log", "log", shell=NOHUP))
    site.process.send_signal(signal.SIGHUP)
    site.pause()
    site.process.terminate()
    assert outcome(site.process) == (0, "", "")


@posix
def test_a_signal_does_not_wait_long_for_512_clients(program):
    """Idle ones, some that send half a request, some that take nothing."""
    long_list(program)
    with contextlib.ExitStack() as stack:
        for octets in [b"", CREATE[:-2]] * 250 + [LIST * 80] * 12:
            stack.enter_context(program.connect()).sendall(octets)
        program.pause()
        program.process.terminate()
        assert outcome(program.process) == (0, "", "")


@posix
def test_a_second_ctrl_c_ends_it_at_once(program):
    long_list(program)
    with stuck_client(program), program.connect() as idle:
        program.pause()
        program.process.send_signal(signal.SIGINT)
        assert read_to_end(idle) == []
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(1) != 0


CONSOLES = {
    "closed from the start": {"shell": CLOSED},
    "broken": {},
    "unbuffered": {"PYTHONUNBUFFERED": "1"},
    "without emoji": {"PYTHONIOENCODING": "ascii"},
}


@posix
@each("console", CONSOLES)
def test_a_console_of_any_kind_harms_nothing(launch, console):
    port = free_port()
    process = launch("-p", port, "--log", "log", **CONSOLES[console])
    site = Site(int(port))
    eventually(lambda: not refuses_connections(site))
    if console == "broken":
        process.stdout.close()
    site.call(*CREATING)
    assert [site.call(*BOOKING).status for _ in "123"] == [201] * 3
    process.terminate()
    printed = console in ("unbuffered", "without emoji") and process.stdout.read()
    assert not printed or " Booking confirmation email sent for booking 3\n" in printed
    assert (process.wait(5), process.stderr.read()) == (0, "")


def refuses_connections(site):
    try:
        site.connect().close()
    except OSError:
        return True


@posix
def test_what_is_queued_in_the_end_is_printed(program):
    """4,000 lines, of which the pipe holds a third, over Ctrl-Z, fg and Ctrl-C."""
    program.call("POST", "/api/events", 1, {**EVENT, "availableTickets": 5000})
    assert statuses(program.talk(BOOK * 4000)) == [201] * 4000
    for name in "SIGSTOP", "SIGCONT", "SIGINT":
        program.process.send_signal(getattr(signal, name))
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.7)
    status, printed, trouble = outcome(program.process)
    assert (status, printed.count("📧"), trouble) == (0, 4000, "")


# ---- The README --------------------------------------------------------------
# What its session, its routes and its limits claim, something runs.


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def blocks(kind):
    """The texts of the README that stand between fences of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)


@posix
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_session_in_the_readme_is_what_happens(program):
    steps = re.findall(
        r"^\$ (curl .*)\n((?:[^$].*\n)*)", "".join(blocks("console")), re.MULTILINE
    )
    assert len(steps) >= 5
    for command, shown in steps:
        command = command.replace("localhost:3000", f"127.0.0.1:{program.port}")
        output = subprocess.check_output(["sh", "-c", f"{command} 2>/dev/null"])
        assert output.decode() == shown, command
    program.process.terminate()
    assert outcome(program.process) == (0, *blocks("text"), "")


def test_the_routes_in_the_readme_are_the_codes():
    shown = re.findall(
        r"^\| `([A-Z]+) (\S+)` \| (.*) \| (.*) \|$", readme(), re.MULTILINE
    )
    told = [
        (method, path, ", ".join(roles) or "anyone", does.__doc__)
        for method, path, roles, does, _ in eventbook.ROUTES
    ]
    assert shown == told


def test_the_limits_in_the_readme_are_the_codes():
    sizes = eventbook.LINE_LIMIT, eventbook.HEADER_LIMIT, eventbook.CONTENT_LIMIT
    assert sizes == (8192, 16384, 65536)
    server = eventbook.Server
    assert (server.patience, server.grace, server.connection_limit) == (16, 2, 512)
    figures = "8 KiB|16 KiB|64 KiB|16 s|2 s|512".split("|")
    assert [one for one in figures if not re.search(rf"\b{one}\b", readme())] == []
