"""Tests of eventbook: its contract in runnable form, against a real server.

    python -m pytest                     # the whole suite takes about 15 seconds
    python -m pytest -k assignment       # the assignment's nine test cases

The fixture `server` is a Client of a server with a log and a console, in a thread of
this process. Event 1 exists from the start, with three tickets. Its methods, such as
create(), send requests and return a Reply, whose body is the JSON and raw its bytes.
talk() sends bytes, such as GET, LIST, CREATE, BOOK and UPDATE, and returns all Replies;
exchange() sends them on a connection that stays open. `shared_server` is one server for
all tests that change nothing. `launch` starts the program as a process.
"""

import contextlib
import email.utils
import functools
import http.client
import io
import itertools
import json
import os
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
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

# ---- The server under test ---------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
EVENT = {"title": "Tech Conference 2026", "date": "2026-02-15", "availableTickets": 3}
DENIED, UNAUTHORIZED = {"error": "Access denied"}, {"error": "Unauthorized"}
NO_EVENT, NO_BOOKING = {"error": "Event not found"}, {"error": "Booking not found"}
SOLD_OUT = {"error": "Booking failed: sold out"}

Reply = namedtuple("Reply", "status body headers raw")
# Without proxies: the environment of whoever runs the tests may name one.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def readme(pattern):
    """Return all that a pattern matches in the README."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return re.findall(pattern, file.read(), re.MULTILINE)


class Client:
    """Sends requests to the server on a port."""

    def __init__(self, port, log=None, server=None):
        self.port, self.log, self.server = port, log, server
        self.connections = server and server.connections

    def create(self, user=1, key=None, **changes):
        body = {**EVENT, **changes}
        return self.call("POST", "/api/events", user, body, with_key(key))

    def update(self, event=1, headers=None, **changes):
        return self.call("PUT", f"/api/events/{event}", 1, changes, headers)

    def read(self, event=1, headers=None):
        return self.call("GET", f"/api/events/{event}", 1, headers=headers)

    def list(self, query="", user=2):
        return self.call("GET", f"/api/events{query}", user)

    def book(self, event=1, user=2, key=None):
        path = f"/api/events/{event}/book"
        return self.call("POST", path, user, headers=with_key(key))

    def cancel(self, booking=1, user=2):
        return self.call("DELETE", f"/api/bookings/{booking}", user)

    def bookings_of_event(self, event=1, query=""):
        return self.call("GET", f"/api/events/{event}/bookings{query}", 1)

    def bookings_of_customer(self, user=2, query=""):
        return self.call("GET", f"/api/bookings{query}", user)

    def call(self, method, path, user=None, body=None, headers=None):
        """Send a request and return the Reply; a dict is sent as JSON."""
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body, headers or {}, method=method)
        if user is not None:
            request.add_header("user-id", str(user))
        try:
            return read_reply(opener.open(request, timeout=20))
        except urllib.error.HTTPError as error:
            return read_reply(error)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def talk(self, *pieces, half_close=True):
        """Send bytes piece by piece; return the Replies until the server closes."""
        with self.connect() as connection:
            for piece in pieces[:-1]:
                connection.sendall(piece)
                self.settle()
            connection.sendall(pieces[-1])
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_to_end(connection)

    def repeat(self, request, times):
        """Send a request many times; each must create something."""
        for start in range(0, times, 100):
            number = min(100, times - start)
            with self.connect() as connection, connection.makefile("rb") as file:
                connection.sendall(request * number)
                connection.shutdown(socket.SHUT_WR)
                assert file.read().count(b"HTTP/1.1 201 Created") == number

    def settle(self):
        """Make a request, so that the server has probably read what was sent before."""
        assert self.call("GET", "/").status == 200

    def logged(self):
        """Return [("created" or "cancelled", booking)] for the lines of the log."""
        entries = [json.loads(line) for line in self.log.read_bytes().splitlines()]
        return [(entry["event"][len("booking.") :], entry["data"]) for entry in entries]


def with_key(key):
    return {} if key is None else {"Idempotency-Key": key}


def make_reply(status, headers, data):
    headers = {name.lower(): value for name, value in headers.items()}
    return Reply(status, json.loads(data) if data else None, headers, data)


def read_reply(response):
    with response:
        return make_reply(response.status, response.headers, response.read())


def read_to_end(connection):
    """Return the Replies until the server closes, 100 Continue included."""
    replies = []
    with connection.makefile("rb") as file:
        for line in iter(file.readline, b""):
            headers = http.client.parse_headers(file)
            data = file.read(int(headers.get("Content-Length", 0)))
            version, status, _ = line.split(b" ", 2)
            replies.append(make_reply(int(status), headers, data))
            assert version == b"HTTP/1.1"
            if status != b"100":
                check_headers(replies[-1])
    return replies


ALWAYS = {
    "content-type": "application/json; charset=utf-8",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}
OTHERS = """date connection keep-alive content-length x-total-count
    allow etag location retry-after www-authenticate""".split()


def check_headers(reply):
    """Check the headers of any response, including those of the parser."""
    headers = reply.headers
    assert ALWAYS.items() <= headers.items() and set(headers) <= {*ALWAYS, *OTHERS}
    assert headers["date"].endswith(" GMT") and "python" not in str(reply).lower()
    date = email.utils.parsedate_to_datetime(headers["date"])
    assert abs(date.timestamp() - time.time()) < 60
    if reply.status != 304:
        assert len(reply.raw) == int(headers["content-length"])
        assert reply.raw.endswith(b"\n")


def statuses(replies):
    return [reply.status for reply in replies]


def exchange(connection, request):
    """Send a request on a connection that stays open; return the Reply."""
    connection.sendall(request)
    return receive(connection)


def receive(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return read_reply(response)


def encoded(text):
    """Return text in Latin-1, the encoding of headers, or else in UTF-8."""
    return text.encode("utf-8" if max(text) > "\xff" else "latin-1")


def raw(method, path, *headers, user=None, body=b""):
    """Return the bytes of a valid request."""
    headers = ["Host: a", *headers]
    headers += [f"user-id: {user}"] if user else []
    headers += [f"Content-Length: {len(body)}"] if body else []
    return encoded("\r\n".join([f"{method} {path} HTTP/1.1", *headers, "\r\n"])) + body


BODY = json.dumps(EVENT).encode()
GET, LIST = raw("GET", "/"), raw("GET", "/api/events", user=2)
CREATE = raw("POST", "/api/events", user=1, body=BODY)
BOOK = raw("POST", "/api/events/1/book", user=2)
UPDATE = raw("PUT", "/api/events/1", user=1)


def ask(body=BODY, id=1, headers=(), method="POST"):
    """Return a Request for a Store without a server."""
    return eventbook.Request(method, "/", "", dict(headers), body, id, 2)


def eventually(condition):
    """Poll until a condition holds that nothing announces, such as a thread's end."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def together(number, work):
    """Return the results of work(0), work(1), ..., run in threads at the same time."""
    start = threading.Barrier(number, timeout=20).wait
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # Threads take turns often, so that races show.
    try:
        with ThreadPoolExecutor(number, initializer=start) as pool:
            return list(pool.map(work, range(number)))
    finally:
        sys.setswitchinterval(interval)


def report(text):
    print(text, file=sys.stderr)


@contextlib.contextmanager
def serving(store, log=None, max_stop=2, **limits):
    """Run a server in a thread; the limits are attributes of its Connections."""
    server = eventbook.Server(("127.0.0.1", 0), store, report)
    server.max_stop = max_stop
    thread = threading.Thread(target=server.serve_forever, args=[0.002])
    thread.start()
    try:
        client = Client(server.server_address[1], log, server)
        client.create()  # before the limits, which may be small
        eventually(lambda: not server.connections.waiting_since)
        for name, value in limits.items():
            setattr(server.connections, name, value)
        yield client
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextlib.contextmanager
def serving_all(folder, **limits):
    """Run a server with log and console, connected as main() does it."""
    with open(folder / "stdout", "a", encoding="utf-8") as stream:
        printer = eventbook.Printer(stream)
        printer.start()

        def printed():
            printer.close(10)
            return (folder / "stdout").read_text("utf-8").splitlines()

        store = eventbook.open_store(str(folder / "log"), printer, report)
        with serving(store, folder / "log", **limits) as server:
            server.printed = printed
            yield server
        printer.close(10)


@pytest.fixture(autouse=True)
def quiet(capsys):
    """Fail a test that leaves something on stderr, such as a traceback of a thread."""
    yield
    assert capsys.readouterr().err == ""


@pytest.fixture
def server(request, tmp_path):
    """A server with its own log, where event 1 has three tickets."""
    threads = threading.active_count()
    with serving_all(tmp_path, **getattr(request, "param", {})) as server:
        yield server
    eventually(lambda: threading.active_count() <= threads)


def with_limits(**limits):
    """Decorate a test so that its server has other limits."""
    return each("server", [limits], indirect=True, ids=[" ".join(limits)])


@pytest.fixture(scope="module")
def shared_server():
    """A server for tests that change nothing; customer 2 has all tickets of event 1."""
    with serving(eventbook.Store()) as server:
        assert statuses(server.book() for _ in range(3)) == [201] * 3
        yield server


def cases(text):
    """Return the test cases of a table, which are separated by "|"."""
    return text.split("|")


def short(value):
    """Return the id of a row in a table of test cases."""
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:30]}..{text[-20:]}({len(text)})"


# ---- Events and bookings -----------------------------------------------------


def test_the_nine_cases_of_the_assignment(server):
    created = server.create()
    assert created[:2] == (201, {"id": 2, **EVENT})
    assert server.create(user=2)[:2] == (403, DENIED)
    assert server.list()[:2] == (200, [{"id": 1, **EVENT}, {"id": 2, **EVENT}])
    for number, customer in (1, 2), (2, 3):
        booking = {"id": number, "eventId": 1, "customerId": customer}
        expected = {"message": "Booking successful", "booking": booking}
        assert server.book(user=customer)[:2] == (201, expected)
    left = {"id": 1, **EVENT, "availableTickets": 1}
    updated = server.call("PUT", "/api/events/1", 1)
    assert updated[:2] == (200, {"message": "Event updated", "event": left})
    assert server.book().status == 201
    assert server.book(user=3)[:2] == (400, SOLD_OUT)
    assert server.list(user=None)[:2] == (401, UNAUTHORIZED)
    assert server.cancel(1).status == 200
    log = [(kind, booking["id"]) for kind, booking in server.logged()]
    assert log == [("created", 1), ("created", 2), ("created", 3), ("cancelled", 1)]
    assert server.printed() == [
        "📧 Booking confirmation email sent for booking 1",
        "📧 Booking confirmation email sent for booking 2",
        "🔔 Event update notification sent to customer 2",
        "🔔 Event update notification sent to customer 3",
        "📧 Booking confirmation email sent for booking 3",
    ]


def test_a_location_leads_to_what_was_created(server):
    created, booked = server.create(), server.book()
    assert created.headers["location"] == "/api/events/2"
    assert server.read(2).headers["etag"] == created.headers["etag"]
    assert booked.headers["location"] == "/api/bookings/1"
    assert server.call("GET", "/api/bookings/1", 2).body == booked.body["booking"]


ROWS = readme(r"^\| `([A-Z]+) (\S+)` \| (.*) \| (.*) \|$")
ROUTES = [
    (method, path, re.findall("[A-Z]{2,}", roles)) for method, path, roles, _ in ROWS
]
ROLES = {None: None, 1: "ORGANIZER", 2: "CUSTOMER", 3: "CUSTOMER", 4: None}


def test_the_root_lists_the_routes_of_the_readme(shared_server):
    root = shared_server.call("GET", "/").body
    assert (root["service"], root["version"]) == ("eventbook", eventbook.VERSION)
    assert len(ROWS) == len(root["routes"]) == 10
    for route, listed in zip(ROUTES, root["routes"]):
        assert route == (listed["method"], listed["path"], listed["roles"])
    assert [row[3] for row in ROWS] == [row["operation"] for row in root["routes"]]


@each("method, path, roles", ROUTES)
def test_a_route_rejects_all_but_its_roles(shared_server, method, path, roles):
    for user, role in ROLES.items():
        reply = shared_server.call(method, path.replace(":id", "9"), user)
        if not roles or role in roles:
            assert reply.status not in (401, 403)
        else:
            assert reply[:2] == ((403, DENIED) if role else (401, UNAUTHORIZED))


USERS = cases("|0|4|+2|02|2.0|2,2|2 2|2\r\nUser-Id: 2|２|²")


@each("user", USERS)
def test_a_malformed_or_unknown_user_id_is_unauthorized(shared_server, user):
    (reply,) = shared_server.talk(raw("GET", "/api/events", f"user-id: {user}"))
    assert (reply.status, reply.body) == (401, UNAUTHORIZED)
    assert reply.headers["www-authenticate"] == "user-id"


OLD, NO_KEY = 'If-Match: "x"', "Idempotency-Key:"
CHECKS = [  # most requests fail several checks; the first of them decides
    ("411 Transfer-Encoding", raw("BREW", "/x", "Transfer-Encoding: chunked")),
    ("413 Body too large", raw("BREW", "/x", "Content-Length: 99999")),
    ("501 Not Implemented", raw("BREW", "/x", "Content-Length: 9")),
    ("501 Not Implemented", raw("Get", "/api/events", user=2)),
    ("501 Not Implemented", raw("PROPFIND", "/api/events", user=2)),
    ("400 Incomplete body", raw("PATCH", "/x", "Content-Length: 9")),
    ("404 Not found", raw("PATCH", "/x", body=b"!")),
    ("405 Method not allowed", raw("PATCH", "/api/events", body=b"!")),
    ("401 Unauthorized", raw("POST", "/api/events", NO_KEY, body=b"!")),
    ("403 Access denied", raw("POST", "/api/events", NO_KEY, user=2, body=b"!")),
    ("400 Validation failed", raw("POST", "/api/events", NO_KEY, user=1, body=b"!")),
    ("400 Validation failed", raw("POST", "/api/events/9/book", NO_KEY, user=2)),
    ("400 Invalid JSON", raw("PUT", "/api/events/9", OLD, NO_KEY, user=1, body=b"!")),
    ("404 Event not found", raw("PUT", "/api/events/9", OLD, user=1, body=b'{"x":1}')),
    ("404 Event not found", raw("GET", "/api/events/9/bookings?limit=x", user=1)),
    ("404 Booking not found", raw("DELETE", "/api/bookings/9", user=3, body=b"!")),
    ("403 Access denied", raw("DELETE", "/api/bookings/1", user=3, body=b"!")),
    ("403 Access denied", raw("GET", "/api/bookings/1", user=3)),
    ("412 Event has", raw("PUT", "/api/events/1", OLD, user=1, body=b'{"x":1}')),
    ("412 Event matches", raw("PUT", "/api/events/1", "If-None-Match: *", user=1)),
    ("400 Booking failed: sold out", raw("POST", "/api/events/1/book", user=2)),
]


def described(reply):
    return f"{reply.status} {reply.body['error']}"


@each("error, request_bytes", CHECKS, ids=short)
def test_the_first_check_that_fails_decides(shared_server, error, request_bytes):
    (reply,) = shared_server.talk(request_bytes)
    assert described(reply).startswith(error)


UNKNOWN_PATHS = cases(
    "/x|/api|/API/events|/api/events/x|/api/events/-1|/*|/api/events//1|//api/events"
    "|/api/events//|/api/events/1/book/2|/api/events/:id|/api/events/%31"
)


@each("path", [*UNKNOWN_PATHS, f"/api/events/{'9' * 601}"], ids=short)
def test_an_unknown_path_is_not_found(shared_server, path):
    assert shared_server.call("GET", path)[:2] == (404, {"error": "Not found"})


def test_an_id_has_up_to_600_digits(shared_server):
    assert shared_server.read("0" * 599 + "1").body["id"] == 1
    assert shared_server.read("9" * 600)[:2] == (404, NO_EVENT)


@each("path", sorted({path for _, path, _ in ROUTES}))
def test_a_405_lists_the_allowed_methods(shared_server, path):
    """This holds for every user, and for a path that ends in a slash."""
    allowed = {method for method, other, _ in ROUTES if other == path}
    allowed |= {"HEAD"} if "GET" in allowed else set()
    path = path.replace(":id", "1").rstrip("/") + "/"
    for method in "PATCH", "OPTIONS", "TRACE", "CONNECT":
        reply = shared_server.call(method, path)
        assert reply[:2] == (405, {"error": "Method not allowed"})
        assert set(reply.headers["allow"].split(", ")) == allowed


@each("path, roles", [route[1:] for route in ROUTES if route[0] == "GET"])
def test_head_has_the_headers_of_get_and_no_body(shared_server, path, roles):
    user, path = 1 if "ORGANIZER" in roles else 2, path.replace(":id", "1")
    get, head = (shared_server.call(method, path, user) for method in ("GET", "HEAD"))
    assert (get.status, head.status, head.body) == (200, 200, None)
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


@each("header", ["X: y", "Content-Length: 99999", "Transfer-Encoding: x", "X : y"])
def test_an_error_response_to_head_has_no_body(shared_server, header):
    with shared_server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(raw("HEAD", "/x", "Connection: close", header))
        connection.shutdown(socket.SHUT_WR)
        response = file.read()
        assert response.startswith(b"HTTP/1.1 4") and response.endswith(b"\r\n\r\n")


TITLE = "must be a string of 1 to 200 characters, not blank"
DATE = "must be a date such as 2026-02-15 or 2026-02-15T19:30"
TICKETS = "must be an integer from 1 to 1,000,000,000"
INVALID_DATES = cases(
    "|now|2026|2026-02|2026-046|20260215|2026-W07-7|2026-2-15|2026-02-30|2025-02-29"
    "|2026-13-01|0000-01-01|２０２６-02-15|2026-02-15T|2026-02-15Z|2026-02-15 19:30"
    "|2026-02-15t19:30|2026-02-15T24:00|2026-02-15T19|2026-02-15T19:60"
    "|2026-02-15T19:30.5|2026-02-15T19:30:60|2026-02-15T19:30:00.|2026-02-15T19:30:00,5"
    "|2026-02-15T19:30+0100|2026-02-15T19:30+25:00|2026-02-15T19:30:00.1234567890"
)
INVALID = [  # name, description, values
    ("title", TITLE, ["", " \t\n", "x".ljust(201), "語" * 201, 5, None, True, ["x"]]),
    ("availableTickets", TICKETS, [0, -1, 10**9 + 1, True, 3.0, 1e9, "3", None]),
    ("date", DATE, [None, 20260215, [], {}, "2026-02-15\n", " 2026-02-15"]),
    ("date", DATE, INVALID_DATES),
]


@each("name, description, values", INVALID)
def test_an_invalid_field_is_described(shared_server, name, description, values):
    for value in values:
        replies = [shared_server.create(**{name: value})]
        if name != "availableTickets":
            replies.append(shared_server.update(**{name: value}))
        for reply in replies:
            assert (reply.status, reply.body["error"]) == (400, "Validation failed")
            assert reply.body["details"] == {name: description}, value


VALID = [
    ("title", ["x", "x" * 200, "語" * 200, "🎟️", '"\\/', "\u0001", "<b>"]),
    ("availableTickets", [1, 10**9]),
    ("date", ["0001-01-01", "9999-12-31", "2024-02-29", "2026-02-15T19:30"]),
    ("date", ["2026-02-15T00:00Z", "2026-02-15T19:30:59", "2026-02-15T23:59+05:30"]),
    ("date", ["2026-02-15T19:30:00.000Z", "2026-02-15T19:30:00.123456789-11:00"]),
]


@each("name, values", VALID)
def test_a_valid_field_is_stored_as_it_is(server, name, values):
    for value in values:
        created = server.create(**{name: value})
        assert (created.status, created.body[name]) == (201, value)
        assert server.update(**{name: value}).status == 200
        assert server.read().body[name] == value


def test_all_invalid_fields_are_described_at_once(shared_server):
    created = shared_server.call("POST", "/api/events", 1, {"x": 1}).body["details"]
    assert created == {"title": TITLE, "date": DATE, "availableTickets": TICKETS}
    updated = shared_server.update(availableTickets=-1, id=2, x=1).body["details"]
    assert updated == {
        "availableTickets": TICKETS.replace("1", "0", 1),
        "id": "must be an integer from 1 to 1",
        "x": "unknown field",
    }


def test_create_ignores_unknown_fields(server):
    unknown = {"id": 7, "colour": "red", "x": [[]] * 900, "y": "{" * 98}
    assert server.create(**unknown)[:2] == (201, {"id": 2, **EVENT})


@each("name", ["colour", "Title", "id", "etag", "__class__"])
def test_update_rejects_unknown_fields_and_other_ids(shared_server, name):
    for value in 2, True, "1", 1.0:
        reply = shared_server.update(**{"title": "New", name: value})
        assert (reply.status, list(reply.body["details"])) == (400, [name])
    assert shared_server.read().body["title"] == EVENT["title"]


@each("change", [{"title": "New"}, {"date": "2027-01-01"}, {"availableTickets": 0}])
def test_update_changes_only_the_given_fields(server, change):
    """An id that is equal to the one in the path is accepted."""
    updated = server.update(**change).body["event"]
    assert server.read().body == updated == {"id": 1, **EVENT, **change}
    assert server.update(**updated).body["event"] == updated
    assert server.book().status == (201 if updated["availableTickets"] else 400)


@each("body", [None, {}])
def test_an_update_of_nothing_notifies_each_customer_once(server, body):
    """Customers with a live booking are notified in the order of their first one."""
    server.create()
    for event, customer in (1, 3), (1, 2), (2, 2), (1, 3):
        server.book(event, customer)
    server.call("PUT", "/api/events/1", 1, body)
    server.cancel(1, user=3)
    assert server.call("PUT", "/api/events/1", 1, body).status == 200
    notified = [line[-1] for line in server.printed() if line.startswith("🔔")]
    assert notified == ["3", "2", "2", "3"]


def test_cancelling_twice_releases_one_ticket(server):
    booking = server.book().body["booking"]
    expected = {"message": "Booking cancelled", "booking": booking}
    assert server.cancel()[:2] == (200, expected)
    assert server.cancel()[:2] == (404, NO_BOOKING)
    assert server.call("GET", "/api/bookings/1", 2)[:2] == (404, NO_BOOKING)
    assert server.read().body == {"id": 1, **EVENT}
    assert server.book().body["booking"]["id"] == 2


UNREADABLE = "not UTF-8, nested too deeply, or an invalid number or character"
INVALID_JSON = [  # the beginning of the error, bodies
    (UNREADABLE, [b'{"title":"\xff"}', b'{"title":"\xed\xa0\x80"}', b"\xff\xfe{\0"]),
    (UNREADABLE, [b'{"title":"\\ud800"}', b'{"\\udfff":1}', b'{"x":1e400}']),
    (UNREADABLE, [b'{"availableTickets":NaN}', b'{"x":[{"y":-Infinity}]}']),
    (UNREADABLE, [b'{"x":' + b"9" * 5000 + b"}"]),
    ("Expecting value", [b" \r\n", b"X" + BODY, b"\0", b"title=x&date=2026-02-15"]),
    ("Expecting property name", [b"{'title':'x'}", b'{\xef\xbb\xbf"title":"x"}']),
    ("Extra data", [BODY + b"x", BODY + BODY]),
    ("Invalid control character", [b'{"title":"\n"}']),
    ("", [BODY[:-1], b'{"title":"x",}']),
    ("JSON has more than 1,000", [b'{"":' * 9500 + b"1" + b"}" * 9500]),
    ("JSON has more than 1,000", [b"[" * 30_000 + b"]" * 30_000, b"[" * 1001]),
    ("must be an object", [b"[" + BODY + b"]", b'"x"', b"1", b"null"]),
    ("JSON has more than 1,000", [b'[{"":' * 501 + b"1" + b"}]" * 501]),
]


@each("error, bodies", INVALID_JSON, ids=short)
def test_invalid_json_is_a_bad_request(shared_server, error, bodies):
    """The message is for a client: it has no codec names and no advice on Python."""
    for body in bodies:
        for method, path in ("POST", "/api/events"), ("PUT", "/api/events/1"):
            reply = shared_server.call(method, path, 1, body)
            assert reply.status == 400, body
            assert error in reply.body["error"] and "JSON" in reply.body["error"], body
            assert not re.search("codec|utf-8-sig|sys[.]", reply.body["error"])


def test_a_byte_order_mark_and_the_content_type_are_ignored(server):
    marked = "\ufeff".encode() + BODY
    for content_type in "text/plain", "application/x-www-form-urlencoded", "":
        headers = {"Content-Type": content_type}
        assert server.call("POST", "/api/events", 1, marked, headers).status == 201
        assert server.call("PUT", "/api/events/1", 1, marked, headers).status == 200
    assert server.call("PUT", "/api/events/1", 1, marked[:3]).status == 200


# ---- Retries -----------------------------------------------------------------


def test_a_retry_with_a_key_books_once(server):
    """The first response is repeated even after the booking was cancelled."""
    first = server.book(key="~" * 255)
    assert first.status == 201
    assert server.book(key="~" * 255)[:2] == first[:2]
    server.cancel()
    path, headers = "/api/events/1/book?x", with_key("~" * 255)
    assert server.call("POST", path, 2, headers=headers)[:2] == first[:2]
    assert server.read().body == {"id": 1, **EVENT}
    assert [kind for kind, _ in server.logged()] == ["created", "cancelled"]
    assert len(server.printed()) == 1


def test_a_retry_with_a_key_creates_once(server):
    """The first response is repeated even after the event was updated."""
    first = server.create(key="k")
    server.update(event=2, title="New")
    again = server.create(key="k")
    assert again[:2] == first[:2] == (201, {"id": 2, **EVENT})
    for name in "location", "etag":
        assert again.headers[name] == first.headers[name]
    assert len(server.list().body) == 2


def test_a_key_belongs_to_one_path_one_body_and_one_user(server):
    error = {"error": "Idempotency-Key of another request"}
    server.create()
    assert server.book(event=1, key="k").status == 201
    assert server.book(event=2, key="k")[:2] == (422, error)
    headers = with_key("k")
    path = "/api/events/1/book"
    assert server.call("POST", path, 2, b"x", headers)[:2] == (422, error)
    assert server.book(event=2, user=3, key="k").body["booking"]["id"] == 2
    assert server.create(key="k").status == 201
    assert server.create(key="k", title="New")[:2] == (422, error)


def test_a_key_has_no_meaning_where_a_repetition_is_harmless(server):
    server.book()
    for headers in with_key("k"), with_key(""):
        for title in "A", "B":
            assert (
                server.update(headers=headers, title=title).body["event"]["title"]
                == title
            )
    for status in 200, 404:
        reply = server.call("DELETE", "/api/bookings/1", 2, headers=with_key("k"))
        assert reply.status == status


def test_a_failed_request_does_not_use_up_its_key(server):
    """A key that was used is remembered even when the event is sold out."""
    for tickets, status in (0, 400), (1, 201), (0, 201):
        server.update(availableTickets=tickets)
        assert server.book(key="k").status == status
    assert server.create(key="k", title="").status == 400
    assert server.create(key="k").status == 201


@each("key", ["", "a b", "a\tb", "ä", "x" * 256, "a\r\nIdempotency-Key: b"], ids=short)
def test_a_key_has_1_to_255_visible_ascii_characters(shared_server, key):
    details = {"Idempotency-Key": "must be 1 to 255 visible ASCII characters"}
    for path, user in ("/api/events", 1), ("/api/events/1/book", 2):
        request = raw("POST", path, f"Idempotency-Key: {key}", user=user, body=BODY)
        (reply,) = shared_server.talk(request)
        assert reply.body == {"error": "Validation failed", "details": details}


def test_the_newest_ten_thousand_keys_are_remembered():
    store = eventbook.Store()
    store.create(ask())
    store.update(ask(b'{"availableTickets":20000}', method="PUT"))

    def book(key):
        request = ask(headers={"idempotency-key": str(key)})
        return store.perform(eventbook.Store.book, request).id

    assert [book(key) for key in range(10_001)] == list(range(1, 10_002))
    assert book(1) == 2  # the second key, which is still known
    assert book(0) == 10_002  # the first key, which is not


# ---- Preconditions -----------------------------------------------------------


def test_etags_are_equal_exactly_if_the_content_is(server):
    server.create()
    tags = {server.read().headers["etag"], server.read(2).headers["etag"]}
    assert len(tags) == 2
    for changes in {"title": "New"}, {"date": "2027-01-01"}, {"availableTickets": 2}:
        changed = server.update(**changes).headers["etag"]
        assert changed == server.read().headers["etag"]
        assert re.fullmatch('"[0-9a-f]+"', changed) and changed not in tags
        tags.add(changed)
        assert server.update(**EVENT).headers["etag"] in tags
    server.book()
    assert server.read().headers["etag"] == changed  # two tickets, as before
    assert len(tags) == 5


PRECONDITIONS = [  # headers, where TAG is the current ETag; statuses of PUT and GET
    (["If-Match: TAG", "If-Match: *", 'If-Match: "old", TAG'], 200, 200),
    (['If-Match: "old"\r\nIf-Match: TAG'], 200, 200),
    (['If-Match: "old"', "If-Match: W/TAG", 'If-Match: W/TAG, "*"'], 412, 412),
    (["If-Match: xTAG", "If-Match: TAGTAG", "If-Match:", "If-Match: x, *"], 412, 412),
    (["If-None-Match: TAG", "If-None-Match: *", 'If-None-Match: "old",TAG'], 412, 304),
    (['If-None-Match: W/"old", W/TAG', "If-Match: *\r\nIf-None-Match: *"], 412, 304),
    (["If-Match: TAG\r\nIf-None-Match: TAG"], 412, 304),
    (['If-Match: "old"\r\nIf-None-Match: TAG'], 412, 412),
    (['If-None-Match: "old"', 'If-None-Match: "*"', "If-None-Match: xTAG"], 200, 200),
    (["If-None-Match: w/TAG", "If-None-Match:"], 200, 200),
]


@each("headers, put_status, get_status", PRECONDITIONS)
def test_if_match_and_if_none_match_guard_put_and_get(
    server, headers, put_status, get_status
):
    """A 412 and a 304 carry the current ETag, and nothing has changed then."""
    server.book()
    for number, header in enumerate(headers):
        before, title = server.read(), str(number)
        tag, body = before.headers["etag"], json.dumps({"title": title}).encode()
        header = header.replace("TAG", tag)
        (get,) = server.talk(raw("GET", "/api/events/1", header, user=1))
        assert (get.status, get.headers["etag"]) == (get_status, tag)
        (put,) = server.talk(raw("PUT", "/api/events/1", header, user=1, body=body))
        after = server.read()
        assert (put.status, put.headers["etag"]) == (put_status, after.headers["etag"])
        assert (after.body["title"] == title) == (put_status == 200)
    notified = [line for line in server.printed() if line.startswith("🔔")]
    assert len(notified) == len(headers) * (put_status == 200)


# ---- Lists -------------------------------------------------------------------


PAGES = [  # query, ids, total
    ("", [1, 2, 3, 4, 5], 5),
    ("?limit=2", [1, 2], 5),
    ("?limit=2&offset=1", [2, 3], 5),
    ("?offset=4&limit=1000", [5], 5),
    (f"?offset={'9' * 600}&limit=1", [], 5),
    ("?available=true", [1, 3, 5], 3),
    ("?available=true&limit=1&offset=1", [3], 3),
    ("?available=false", [1, 2, 3, 4, 5], 5),
    ("?sort=title&sort=date&x&=&%00", [1, 2, 3, 4, 5], 5),
]


def test_a_list_has_limit_offset_and_total(server):
    """Events 2 and 4 are sold out. Each list is read twice: the second is cached."""
    for event in 2, 3, 4, 5:
        server.create(availableTickets=1)
    assert statuses([server.book(2), server.book(4)]) == [201, 201]
    for query, ids, total in PAGES:
        for listed in server.list(query), server.list(query):
            assert [event["id"] for event in listed.body] == ids, query
            assert listed.headers["x-total-count"] == str(total), query


PAGE = {
    "limit": "must be an integer from 1 to 1,000",
    "offset": "must be an integer from 0 upwards",
    "available": "must be true or false",
}
INVALID_QUERIES = cases(
    "limit=0|limit=1001|limit=x|limit=|limit=-1|limit=1.0|limit=1_0|limit=%EF%BC%91"
    "|limit=%2B1|offset=-1|offset=x|offset=|offset=1e3|available=|available=1"
    "|available=True|limit=abc&limit=1|limit=1&limit=abc|limit=1&limit=1"
    "|offset=x&offset=1|offset=1&%6Fffset=1|available=true&available=true"
)


@each("query", [*INVALID_QUERIES, f"offset={'9' * 601}"], ids=short)
def test_an_invalid_query_is_a_bad_request(shared_server, query):
    name, lists = query.split("=")[0], [shared_server.list(f"?{query}")]
    if name != "available":
        lists.append(shared_server.bookings_of_event(1, f"?{query}"))
        lists.append(shared_server.bookings_of_customer(2, f"?{query}"))
    for reply in lists:
        assert (reply.status, reply.body["details"]) == (400, {name: PAGE[name]})


def test_bookings_are_listed_by_event_and_by_customer(server):
    server.create()
    for event, customer in (1, 2), (2, 3), (1, 3), (1, 2):
        server.book(event, customer)
    server.cancel(1)
    assert [booking["id"] for booking in server.bookings_of_event(1).body] == [3, 4]
    assert [booking["id"] for booking in server.bookings_of_customer(2).body] == [4]
    query = "?offset=1&limit=1&available=x"
    for second, id in (
        (server.bookings_of_customer(3, query), 3),
        (server.bookings_of_event(1, query), 4),
    ):
        assert [booking["id"] for booking in second.body] == [id]
        assert second.headers["x-total-count"] == "2"


def test_without_a_limit_a_list_is_complete():
    store = eventbook.Store()
    event = store.create(ask())
    store.events = {id: event._replace(id=id) for id in range(1, 3001)}
    assert len(json.loads(store.list_events(ask()).body)) == 3000


def test_a_record_is_encoded_once():
    """So a list after a booking encodes one event, however many there are."""
    store = eventbook.Store()
    events = [store.create(ask()) for _ in range(3)]
    texts = [event.json_text for event in events]
    store.book(ask(id=2))
    listed = [event.json_text for event in store.events.values()]
    assert [new is old for new, old in zip(listed, texts)] == [True, False, True]


# ---- Races -------------------------------------------------------------------
# If one operation of Store runs without the lock, a test of this section fails.


def test_concurrent_bookings_sell_each_ticket_once(server):
    """The log has the bookings in the order of their ids."""
    server.update(availableTickets=200)

    def book(number):
        ids, user = [], 2 + number % 2
        while (reply := server.book(user=user)).status == 201:
            ids.append(reply.body["booking"]["id"])
        assert reply[:2] == (400, SOLD_OUT)
        return ids

    booked = [booking for ids in together(16, book) for booking in ids]
    logged = [booking["id"] for _, booking in server.logged()]
    assert sorted(booked) == logged == list(range(1, 201))
    assert server.read().body["availableTickets"] == 0
    assert len(server.printed()) == 200


def test_concurrent_creates_give_each_event_an_id(server):
    together(12, lambda _: server.repeat(CREATE, 60))
    assert [event["id"] for event in server.list().body] == list(range(1, 722))


def test_concurrent_requests_with_one_key_have_one_effect(server):
    """The events have a large unknown field, so that creating them takes some time."""

    def all_get_the_same(request):
        replies = together(16, lambda _: request()[:2])
        assert replies == [(201, replies[0][1])] * 16

    for key in "abc":
        all_get_the_same(functools.partial(server.book, key=key))
    for key in "abcdef":
        numbers = list(range(10_000))
        all_get_the_same(functools.partial(server.create, key=key, x=numbers))
    assert len(server.logged()) == len(server.printed()) == 3
    assert len(server.list().body) == 7


@pytest.fixture
def slow_server():
    """A server that waits between the check and the change of an operation.

    When it waits, the semaphore `server.waiting` is released.
    """
    store, waiting = eventbook.Store(), threading.Semaphore(0)

    def wait(*_):
        waiting.release()
        time.sleep(0.02)

    for name in "booking.created", "booking.cancelled", "event.updated":
        store.on(name, wait)
    with serving(store) as server:
        server.waiting = waiting
        yield server


def test_only_one_of_many_slow_cancellations_succeeds(slow_server):
    slow_server.book()
    replies = together(8, lambda _: slow_server.cancel().status)
    assert sorted(replies) == [200] + [404] * 7
    assert slow_server.read().body == {"id": 1, **EVENT}


def test_only_one_of_many_slow_updates_with_one_etag_succeeds(slow_server):
    headers = {"If-Match": slow_server.read().headers["etag"]}

    def update(number):
        return slow_server.update(headers=headers, title=str(number)).status

    replies = together(8, update)
    assert sorted(replies) == [200] + [412] * 7
    assert slow_server.read().body["title"] == str(replies.index(200))


LISTS = [("/api/events?available=true", 2), ("/api/events/1/bookings", 1)]
LISTS += [("/api/bookings", 2), ("/api/events/1", 1), ("/api/bookings/1", 2)]


@each("path, user", LISTS)
def test_a_booking_is_seen_by_every_request_that_is_made_after_its_log_line(
    slow_server, path, user
):
    """The observer stands for the log. A read waits until the operation is complete."""
    with ThreadPoolExecutor(1) as pool:
        booked = pool.submit(slow_server.book)
        assert slow_server.waiting.acquire(timeout=20)
        seen = slow_server.call("GET", path, user)
        assert booked.result().status == 201
    assert seen[:2] == slow_server.call("GET", path, user)[:2]


# ---- Framing -----------------------------------------------------------------
# Each malformed request stands between two valid ones. The first gets its response, the
# second is not read: nobody can say where it begins. A row has a pattern of the
# response, and cases that are separated by "|".

REQUEST_LINES = {  # a Host follows
    "400 Malformed request line": "Host: a|GET|GET /|GET / |/ HTTP/1.1|GET HTTP/1.1|\n"
    "| | GET / HTTP/1.1|GET  / HTTP/1.1|GET /  HTTP/1.1|GET / HTTP/1.1 "
    "|GET\t/ HTTP/1.1|GET /\tHTTP/1.1|GET / x HTTP/1.1|GET / HTTP/1.1x|GET / HTTP"
    "|GET / HTTP/1|\x16\x03|GET / HTTP/.1|GET / HTTP/1.1.1|GET / HTTP/+1.1"
    "|GET / HTTP/01.01|GET / HTTP/1.١|GET / http/1.1|GET / HTTP/0.9|(GET) / HTTP/1.1"
    "|GÄT / HTTP/1.1|GET: / HTTP/1.1|GET\0 / HTTP/1.1|GET /ä HTTP/1.1|GET /\0 HTTP/1.1"
    "|GET /\x7f HTTP/1.1|GET / HTTP/1.1\n|GET\xa0/\xa0HTTP/1.1|GET /\nX: y HTTP/1.1"
    "|GET /#a HTTP/1.1|GET /?a#b HTTP/1.1|GET http://a/#b HTTP/1.1",
    "400 Invalid request target": "GET api/events HTTP/1.1|GET * HTTP/1.1"
    "|GET ? HTTP/1.1|OPTIONS ** HTTP/1.1|CONNECT a:80 HTTP/1.1|GET http:// HTTP/1.1"
    "|GET ftp://a/ HTTP/1.1|GET http:/a HTTP/1.1|GET http://u@a/ HTTP/1.1"
    "|GET http://a:b/ HTTP/1.1",
    "414 Request line too long": f"GET /{'x' * 8192} HTTP/1.1|{'x' * 9000}",
    "414 (Request-)?URI Too Long": "x" * 70_000,
    "505 Use HTTP/1.0 or HTTP/1.1": "GET / HTTP/2.0|GET / HTTP/1.2|PRI * HTTP/2.0",
}
HEADER_LINES = {  # a Host precedes
    "400 Malformed or incomplete header line": "X : 1|X\t: 1| X: 1|\tX: 1|X|X 1|: 1"
    '|=: 1| |\t|X@Y: 1|X(Y): 1|Xä: 1|X/Y: 1|\xa0X: 1|X[:1|"X": 1|X\\: 1|X: \0'
    "|X: \x01|X: \x7f|X: \x1b[31m|X: \x0b|\0X: 1|X\0: 1|X: a\n b|X: a\rb|X: a\nY: b"
    "|X: a\r|X: a\r\n b|X: a\rContent-Length: 9|X: a\r\n\tb|X: a\r\n  ",
    "400 Exactly one valid Host is required": "Host: a|Host: b|HOST: a",
    "431 Headers too large": f"X: {'x' * 16384}|" + "\r\n".join(["X: 1"] * 3000),
}
HOSTS = {  # there are no other headers
    "400 Exactly one valid Host is required": "X: 1|Host:|Host: |Host: a, b|Host: a,b"
    "|Host: u@a|Host: a/b|Host: http://a|Host: a b|Host: a:b|Host: a:80:80|Host: [::1"
    "|Host: ::1|Host: a?b|Host: a#b|Host: a\\b|Host: ä|Host: <a>|Host: a:-1|Host: [a]b"
    '|Host: "a"|Host: a:123456',
}
LENGTHS = {  # the value of Content-Length, and what follows it
    "400 Invalid Content-Length": '+2|-2|2 2|2,2|2, 2|2_0|0x2|2.0|²|２| |"2"|2;|\xa02'
    "|2\r\nContent-Length: 2|2\r\ncontent-length: 3",
    "400 Transfer-Encoding unsupported": "2\r\nTransfer-Encoding: chunked"
    "|0\r\nTransfer-Encoding: chunked",
    "413 Body too large": f"65537|99999999999999999999|{'9' * 5000}|000065537",
}
CODINGS = {  # the value of Transfer-Encoding, and what follows it
    "400 Malformed or incomplete header line": "\x0bchunked|chunked\r\n fold|x\0",
    "400 Transfer-Encoding unsupported": "chunked\r\nContent-Length: 2",
    "411 Transfer-Encoding unsupported": "chunked|Chunked|identity|gzip, chunked|x| ",
}
WHOLE_REQUESTS = {
    "400 Malformed request line": "GET / HTTP/1.1\nHost: a\n\n|\n"
    "|\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n|GET / HTTP/1.1\rHost: a\r\r\n\n",
    "400 Exactly one valid Host is required": "GET / HTTP/1.0\r\nHost: a, b\r\n\r\n",
    "400 Malformed or incomplete header line": "GET / HTTP/1.1\r\nHost: a\n\r\n"
    "|GET / HTTP/1.1\r\nHost: a\r\n\n",
    "414 Request line too long": f"\r\n{'x' * 9000}",
    "431 Headers too large": f"GET / HTTP/1.1\r\nX: {'x' * 16_381}\r\nHost: a\r\n\r\n"
    f"|GET / HTTP/1.1\r\nX: {'x' * 17_000}",
}
TEMPLATES = [
    ("...\r\nHost: a\r\n\r\n", REQUEST_LINES),
    ("GET / HTTP/1.1\r\nHost: a\r\n...\r\n\r\n", HEADER_LINES),
    ("GET / HTTP/1.1\r\n...\r\n\r\n", HOSTS),
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ...\r\n\r\n{}", LENGTHS),
    ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ...\r\n\r\n{}", CODINGS),
    ("POST / HTTP/1.0\r\nTransfer-Encoding: ...\r\n\r\n{}", CODINGS),
    ("...", WHOLE_REQUESTS),
]
MALFORMED = [
    (error, encoded(template.replace("...", case)))
    for template, table in TEMPLATES
    for error, row in table.items()
    for case in cases(row)
]


@each("error, malformed", MALFORMED, ids=short)
def test_a_malformed_request_is_rejected_and_closed(shared_server, error, malformed):
    replies = shared_server.talk(GET + malformed + GET, half_close=False)
    assert statuses(replies) == [200, int(error[:3])]
    assert re.fullmatch(error, described(replies[1]))
    assert replies[1].headers["connection"] == "close"
    assert "keep-alive" not in replies[1].headers
    assert len(shared_server.talk(malformed, half_close=False)) == 1


def of_size(request_line, headers):
    """Return a request whose request line and headers have these sizes in bytes."""
    header = "X: " + "x" * (headers - len("Host: a\r\nX: \r\n"))
    return raw("GET", "/?" + "x" * (request_line - len("GET /? HTTP/1.1")), header)


VALID_HOSTS = cases(" \t a_b \t |[::1]:3000| [Fe80::1.2.3.4]|a:| A-b.c~%20:65535")
TARGETS = cases("http://a/|HTTP://A:80/|https://a?x|/?a=b?c/d&%zz|http://[::1]:80")
KEEPS_OPEN = [
    *[(200, encoded(f"GET / HTTP/1.1\r\nHost:{host}\r\n\r\n")) for host in VALID_HOSTS],
    *[(200, raw("GET", target)) for target in TARGETS],
    (200, raw("GET", "/", body=GET)),
    (200, raw("GET", "/", body=b" " * 65536)),
    (200, of_size(8192, 99)),
    (200, b"\r\n" + of_size(8192, 16384)),
    (200, raw("GET", "/", "X:", "X: a\tb", "!#$%&'*+-.^_`|~09azAZ: 1", "Y: ä")),
    (200, raw("GET", "/", "Content-Length: 0000000002") + b"xx"),
    (200, raw("GET", "/", "Connection: keep-alive", 'Connection: TE, closed, "close"')),
    (200, raw("GET", "/", "Connection:", *["X: 1"] * 2000)),
    (304, raw("GET", "/api/events/1", "If-None-Match: *", user=1)),
    (304, raw("HEAD", "/api/events/1", "If-None-Match: *", user=1)),
    (400, raw("POST", "/api/events", user=1, body=GET)),
    (401, raw("POST", "/api/events", body=GET)),
    (403, raw("POST", "/api/events", user=2, body=GET)),
    (404, raw("POST", "/x", body=GET)),
    (404, raw("OPTIONS", "*", body=GET)),
    (405, raw("PATCH", "/", body=GET)),
    (412, raw("PUT", "/api/events/1", "If-None-Match: *", user=1, body=b"{}")),
    (200, raw("PUT", "/api/events/1", "Idempotency-Key:", user=1, body=b"{}")),
]
CLOSES = [
    (200, b"GET / HTTP/1.0\r\n\r\n"),
    (200, b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"),
    (200, raw("GET", "/", "Connection: x ,\tClose ,")),
    (200, raw("GET", "/", "Connection: keep-alive", "Connection: close")),
    (501, raw("BREW", "/", body=GET)),
    (501, raw("BREW", "/", "Expect: 100-continue", body=GET)),
    (413, raw("GET", "/", body=b" " * 65537)),
    (413, raw("POST", "/", "Expect: 100-continue", "Content-Length: 65537")),
    (414, of_size(8193, 99)),
    (431, of_size(99, 16385)),
]


@each("status, first", KEEPS_OPEN, ids=short)
def test_a_complete_request_keeps_the_connection_open(shared_server, status, first):
    """The advertised timeout is one second less than the server's."""
    replies = shared_server.talk(first + GET + GET)
    assert statuses(replies) == [status, 200, 200]
    for reply in replies:
        assert reply.headers["keep-alive"] == "timeout=15"
        assert reply.headers["connection"] == "keep-alive"


@each("status, last", CLOSES, ids=short)
def test_a_response_that_closes_the_connection_says_so(shared_server, status, last):
    """A body that was not read is never parsed as a request."""
    (reply,) = shared_server.talk(last + GET, half_close=False)
    assert (reply.status, reply.headers["connection"]) == (status, "close")
    assert "keep-alive" not in reply.headers


def test_an_absolute_target_leads_to_its_path(shared_server):
    (reply,) = shared_server.talk(raw("GET", "http://b:80/api/events/1?x", user=1))
    assert reply.body["id"] == 1
    (reply,) = shared_server.talk(raw("GET", "http://b/api/events?limit=x", user=2))
    assert reply.body["details"] == {"limit": PAGE["limit"]}


def test_a_client_that_expects_100_gets_it_before_it_sends_the_body(server):
    headers = "Expect: 100-Continue", f"Content-Length: {len(BODY)}"
    head = raw("POST", "/api/events", *headers, user=1)
    replies = server.talk(head, BODY + head, BODY)
    assert statuses(replies) == [100, 201] * 2
    assert statuses(server.talk(head.replace(b"1.1", b"1.0", 1), BODY)) == [201]
    replies = server.talk(raw("POST", "/x", *headers), BODY + GET)
    assert statuses(replies) == [100, 404, 200]


def test_control_characters_of_a_client_are_escaped(shared_server):
    name = '"\r\nSet-Cookie: x\x1b<script>'
    body = json.dumps({name: 1}).encode()
    (reply,) = shared_server.talk(raw("PUT", "/api/events/1", user=1, body=body))
    assert (reply.status, "set-cookie" in reply.headers) == (400, False)
    assert not re.search(b"[\r\x1b]|\n.", reply.raw)


def test_empty_lines_after_the_last_request_get_no_response(shared_server):
    for data in b"\r\n", GET + b"\r\n", GET + GET + b"\r\n":
        assert statuses(shared_server.talk(data)) == [200] * data.count(b"GET")


LONG = [  # 8 to 64 KiB; no cache has seen the number that takes the place of _N_
    raw("GET", "/", "X: _N_", f"Connection: x{' ' * 16_000}x"),
    raw("GET", "/", "X: _N_", f"Connection: {',' * 16_000}"),
    raw("GET", "/", f"X: _N_{' ' * 16_000}x"),
    raw("GET", "/", "X: _N_", *["a:"] * 4000),
    raw("GET", "/", f"Content-Length: {'0' * 16_000}_N_x"),
    raw("GET", "/_N_" + "9" * 8000),
    raw("GET", f"http://{'a' * 8000}_N_@/"),
    raw("PUT", "/api/events/1", "X: _N_", f"If-Match: x{' ' * 16_000}x", user=1),
    raw("GET", f"/api/events?_N_{'&' * 8000}", user=2),
    raw("GET", f"/api/events?_N_{'%' * 8000}", user=2),
    raw("GET", f"/api/events?offset=_N_{'9' * 8000}", user=2),
    raw("POST", "/api/events", user=1, body=b'{"_N_":' + b" " * 65_000 + b"!"),
    raw("POST", "/api/events", user=1, body=b"[_N_" + b"9" * 65_000 + b"]"),
    raw("POST", "/api/events", user=1, body=b'"_N_' + b"\\u0000" * 10_000),
    raw("POST", "/api/events", user=1, body=b"[_N_" + b"[{" * 32_000),
]


@each("long", LONG, ids=short)
def test_the_cost_of_parsing_is_proportional_to_the_size(shared_server, long):
    """A quadratic parser takes 0.2 s of processor time; the fastest of three counts."""
    durations = []
    for number in b"111", b"222", b"333":
        begin = time.process_time()
        assert len(shared_server.talk(long.replace(b"_N_", number))) == 1
        durations.append(time.process_time() - begin)
    assert min(durations) < 0.15


# ---- Connections -------------------------------------------------------------


def test_a_request_can_arrive_in_pieces_but_is_never_performed_before_its_end(server):
    assert server.talk(b"") == server.talk(b"\r\n") == []
    for at in range(1, len(CREATE), 5):
        assert statuses(server.talk(CREATE[:at])) == [400], at
    assert server.list().body == [{"id": 1, **EVENT}]
    for at in range(1, len(CREATE), 5):
        assert statuses(server.talk(CREATE[:at], CREATE[at:])) == [201], at


@pytest.fixture
def pairs():
    """Four pairs of connected sockets: the server's side and the client's."""
    with contextlib.ExitStack() as stack:
        both = [socket.socketpair() for _ in range(4)]
        for side in itertools.chain(*both):
            stack.enter_context(side).settimeout(20)
        yield both


def make_connections(pairs, limit):
    """Return Connections that wait for four clients since 0, 1, 2 and 3 s.

    Their clock stands still until a test sets `now`.
    """
    connections = eventbook.Connections(clock=lambda: connections.now)
    connections.limit = limit
    for connections.now, (side, _) in enumerate(pairs):
        connections.set_waiting(side)
    return connections


WAITS = [  # the limit of connections, the time, and how many are dropped then
    (5, 15.9, 0),
    (5, 16, 1),
    (5, 17.5, 2),
    (5, 99, 4),
    (4, 0.9, 0),
    (4, 3, 1),  # The others stay, because there is room again.
    (3, 3, 2),
    (1, 3, 3),
    (1, 9, 4),
]


@each("limit, now, dropped", WAITS)
def test_clients_are_dropped_that_are_too_slow(pairs, limit, now, dropped):
    """The limit is 16 s, or 1 s while there are as many connections as allowed."""
    connections = make_connections(pairs, limit)
    connections.now = now
    connections.drop_slow()
    assert list(connections.waiting_since) == [side for side, _ in pairs[dropped:]]
    for side, client in pairs[:dropped]:
        assert client.recv(1) == b""
        with pytest.raises(OSError):
            connections.set_busy(side)


def test_a_busy_connection_is_not_dropped(pairs):
    """When it is busy no longer, its time begins anew. Removing it makes room."""
    connections = make_connections(pairs, limit=4)
    first = pairs[0][0]
    connections.set_busy(first)
    connections.now = 1000
    connections.drop_slow()
    assert list(connections.waiting_since) == [first]
    connections.set_waiting(first)
    connections.drop_slow()
    assert list(connections.waiting_since) == [first]
    connections.limit = 1
    for full in True, False, False:
        assert connections.is_full() == full
        connections.remove(first)


def test_the_stop_ends_reading_at_once_and_drops_at_the_deadline(pairs):
    """A client that has reset its connection does not prevent this. In the second half
    of the time, responses close their connections, as those of a full server do."""
    connections = make_connections(pairs, limit=5)
    pairs[0][0].close()
    for _, client in pairs[1:]:
        client.sendall(b"request")
    assert not connections.is_full()
    stop = threading.Thread(target=connections.stop, args=[0.05])
    stop.start()
    for side, client in pairs[1:]:
        assert (side.recv(99), side.recv(99)) == (b"request", b"")
        assert client.recv(1) == b""
        with pytest.raises(OSError):
            connections.set_busy(side)
    stop.join(20)
    assert connections.is_full()


@each("files, limit", [(1000, 512), (300, 276), (30, 8), (-1, 512)])
def test_the_limit_of_connections_leaves_descriptors(monkeypatch, files, limit):
    """The log and the console need some. The system says -1 if there is no limit."""
    monkeypatch.setattr(os, "sysconf", lambda name: files, raising=False)
    assert eventbook.Connections().limit == limit


def test_caches_are_bounded():
    for name in "find_route", "parse_request_line", "parse_headers":
        assert getattr(eventbook, name).cache_info().maxsize < 1000


def test_the_date_advances(server):
    first = server.read().headers["date"]
    eventually(lambda: server.read().headers["date"] != first)


def make_a_long_list(server):
    """Create so many events that 30 lists of them, 11 MB, fit into no socket buffer."""
    body = json.dumps({**EVENT, "title": "\x01" * 200}).encode()
    server.repeat(raw("POST", "/api/events", user=1, body=body), 300)


def reset(connection):
    """Disconnect with a TCP reset instead of a FIN."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def is_disconnected(connection):
    """Tell whether the other side has closed a connection, by sending an empty line."""
    try:
        connection.sendall(b"\r\n")
    except OSError:
        return True


STATES = {
    "new": b"",
    "in the request line": CREATE[:20],
    "in the body": CREATE[:-1],
    "answered": GET,
    "answered with an error": raw("GET", "/x"),
    "reads nothing": LIST * 30,
    "rejected": b"\0\n",
    "rejected and still sending": b"\0\n" * 50_000,
}


@with_limits(limit=3, max_wait_if_full=60)
@each("data", STATES.values(), ids=STATES)
def test_a_client_that_disconnects_leaves_its_place(server, data):
    """Ten clients come and go, and there is room for three."""
    make_a_long_list(server)
    for _ in range(10):
        connection = server.connect()
        connection.sendall(data)
        server.settle()
        reset(connection)
    with server.connect() as first, server.connect() as second:
        assert statuses([exchange(first, GET), exchange(second, GET)]) == [200, 200]


@each("data", STATES.values(), ids=STATES)
def test_a_client_is_dropped_in_any_state(server, data):
    make_a_long_list(server)
    with server.connect() as connection:
        connection.sendall(data)
        server.settle()
        server.connections.max_wait = 0
        eventually(lambda: not server.connections.waiting_since)
        eventually(lambda: is_disconnected(connection))
    server.connections.max_wait = 16
    assert len(server.list().body) == 301


@each("moment, statuses_expected", [("before", []), ("after", [201])])
def test_a_client_that_is_dropped_at_the_last_moment_has_booked_nothing(
    server, moment, statuses_expected
):
    """Once its request is performed, it is not dropped."""

    class Dropping(eventbook.Connections):
        def set_busy(self, connection):
            if moment == "after":
                super().set_busy(connection)
            self.max_wait = 0
            self.drop_slow()
            self.max_wait = 16
            if moment == "before":
                super().set_busy(connection)

    server.server.connections = Dropping()
    assert statuses(server.talk(BOOK)) == statuses_expected
    assert len(server.logged()) == len(statuses_expected)


@with_limits(limit=1, max_wait_if_full=60)
def test_a_full_server_closes_after_each_response(server):
    with server.connect() as connection:
        connection.sendall(GET)
        (reply,) = read_to_end(connection)
    assert reply.headers["connection"] == "close"
    assert server.list().status == 200


@with_limits(limit=1, max_wait_if_full=60)
def test_a_full_server_uses_no_processor_time(server):
    """A client waits for 0.2 s while another one has the only place."""
    with server.connect(), server.connect() as waiting:
        waiting.settimeout(0.2)
        begin = time.process_time()
        with pytest.raises(OSError):
            exchange(waiting, GET)
        assert time.process_time() - begin < 0.1


class Unreliable:
    """A listening socket whose first ten accept() calls fail."""

    def __init__(self, socket):
        self.socket, self.failures = socket, 10

    def __getattr__(self, name):
        return getattr(self.socket, name)

    def accept(self):
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionAbortedError("aborted")
        return self.socket.accept()


@with_limits(max_wait_if_full=0)
def test_an_error_of_accept_closes_nobody(server):
    with server.connect() as first, server.connect() as second:
        assert statuses([exchange(first, GET), exchange(second, GET)]) == [200, 200]
        server.server.socket = Unreliable(server.server.socket)
        assert server.list().status == 200
        assert server.server.socket.failures < 0
        assert statuses([exchange(first, GET), exchange(second, GET)]) == [200, 200]


@linux
@with_limits(max_wait=99)
def test_many_clients_are_served_at_the_same_time(server):
    resource = pytest.importorskip("resource")
    if 0 < resource.getrlimit(resource.RLIMIT_NPROC)[0] < 1000:
        pytest.skip("the system may allow too few threads")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(200)]
        assert statuses(exchange(client, GET) for client in clients) == [200] * 200
        (side, *_) = server.connections.waiting_since
        assert side.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_threads_are_reused():
    store, threads = eventbook.Store(), set()
    store.on("event.updated", lambda *_: threads.add(threading.current_thread()))
    with serving(store) as server:
        assert statuses(server.update() for _ in range(30)) == [200] * 30
    assert 1 <= len(threads) < 10


@linux
def test_a_connection_without_a_thread_waits_for_one(server):
    """No thread can start with a stack that is larger than the address space."""
    with server.connect() as client:
        assert exchange(client, GET).status == 200
        threading.stack_size(2**50)
        try:
            with server.connect() as newcomer:
                newcomer.sendall(BOOK)
                server_thread_is_free = exchange(client, GET.replace(b"1.1", b"1.0"))
                assert server_thread_is_free.status == 200
                client.close()
                assert receive(newcomer).status == 201
        finally:
            threading.stack_size(0)


@each("data", [raw("GET", "/", "X : 1"), raw("BREW", "/"), b"\n"], ids=short)
def test_an_error_can_be_read_by_a_client_that_still_sends(server, data):
    """Closing with unread input would reset the connection and lose the error."""
    (reply,) = server.talk(data, *[b"x" * 99_999] * 9)
    assert reply.status in (400, 501)


class Vanishing(eventbook.Handler):
    timeout = 0.001  # Reading then raises a TimeoutError, as if the network vanished.


@each("data", [b"", CREATE[:20], CREATE[:-1]], ids=["new", "line", "body"])
def test_a_client_whose_network_vanishes_causes_no_line_on_stderr(server, data):
    """The fixture `quiet` checks this."""
    server.server.RequestHandlerClass = Vanishing
    with server.connect() as connection:
        connection.sendall(data)
        eventually(lambda: is_disconnected(connection))


# ---- Log and console ---------------------------------------------------------


def test_a_log_line_is_exactly_as_assigned(server):
    server.book()
    line = server.log.read_text("utf-8")
    stamp = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line)[0]
    logged = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f%z")
    assert abs(logged.timestamp() - time.time()) < 60
    data = '"data":{"id":1,"eventId":1,"customerId":2}'
    assert line == f'{{"event":"booking.created","timestamp":"{stamp}",{data}}}\n'


@each("content", [b"", b"{}\n", b'{}\n{"event":"boo'])
def test_a_restart_appends_whole_lines_to_the_log(tmp_path, content):
    """An incomplete line, left by a crash, is terminated first. Ids restart at 1."""
    (tmp_path / "log").write_bytes(content)
    for _ in range(2):
        with serving_all(tmp_path) as server:
            assert server.book().body["booking"]["id"] == 1
    *kept, first, second, rest = server.log.read_bytes().split(b"\n")
    assert (kept, rest) == (content.splitlines(), b"")
    assert json.loads(first)["data"] == json.loads(second)["data"]


CHANGES_OF_THE_LOG = {
    "renamed": lambda log: log.rename(f"{log}.1"),
    "removed": os.remove,
    "truncated": lambda log: os.truncate(log, 0),
}


@each("change", CHANGES_OF_THE_LOG.values(), ids=CHANGES_OF_THE_LOG)
def test_the_next_line_is_the_first_of_a_new_or_truncated_log(server, change):
    server.book()
    change(server.log)
    assert statuses([server.book(), server.book()]) == [201, 201]
    assert [booking["id"] for _, booking in server.logged()] == [2, 3]


def test_a_log_that_is_truncated_all_the_time_costs_no_booking(server):
    server.update(availableTickets=10_000)
    ended = threading.Event()

    def client(number):
        while number == 0 and not ended.is_set():
            os.truncate(server.log, 0)
        try:
            server.repeat(BOOK, 200)
        finally:
            ended.set()

    server.book()
    together(5, client)
    content = server.log.read_bytes()
    assert b"\n\n" not in content and not content.startswith(b"\n")
    assert server.book().body["booking"]["id"] == 1002


def test_without_the_log_nothing_changes_and_stderr_says_why(server, capsys):
    """Each outage is reported once. The failed booking does not use up its key."""
    server.book()
    for number in 2, 3:
        os.remove(server.log)
        os.mkdir(server.log)
        for reply in server.book(key=f"k{number}"), server.cancel(), server.book():
            assert reply[:2] == (503, {"error": "The log cannot be written"})
            assert 0 < int(reply.headers["retry-after"]) <= 60
        os.rmdir(server.log)
        assert server.book(key=f"k{number}").body["booking"]["id"] == number
        problem = r"eventbook: cannot write the log: .*log.*\n"
        assert re.fullmatch(problem, capsys.readouterr().err)
    assert len(server.bookings_of_event().body) == len(server.printed()) == 3


FAILING = [
    ("booking.created", Client.book),
    ("booking.cancelled", Client.cancel),
    ("event.updated", Client.update),
]


@each("name, change", FAILING)
def test_an_observer_that_raises_prevents_the_change(capsys, name, change):
    """The client gets a 500, stderr the traceback; later observers are not called."""
    called, store = [], eventbook.Store()
    with serving(store) as server:
        server.book()
        store.on(name, lambda *_: 1 / 0)
        store.on(name, lambda *_: called.append(name))
        before = server.read()[:2], server.bookings_of_event().body
        assert change(server)[:2] == (500, {"error": "Internal server error"})
        assert (server.read()[:2], server.bookings_of_event().body) == before
        problem = capsys.readouterr().err
        assert (called, problem.count("ZeroDivisionError")) == ([], 1)
        assert "in <lambda>" in problem
        del store.observers[name][0]
        assert (change(server).status < 300, called) == (True, [name])


def test_an_observer_can_remove_itself_while_it_is_called():
    store, called = eventbook.Store(), []

    def once(*_):
        store.observers["x"].remove(once)

    store.on("x", once, lambda *_: called.append("x"))
    store.emit("x", None)
    store.emit("x", None)
    assert called == ["x", "x"]


def test_a_bug_in_a_response_is_a_500_and_keeps_no_connection(server, capsys):
    """The cached list cannot be sent. Its client stays, until it is dropped."""
    server.server.store.list_cache = "", eventbook.Response(200, "no bytes", {})
    with server.connect() as connection:
        assert exchange(connection, LIST).status == 500
        server.connections.max_wait = 0
        eventually(lambda: is_disconnected(connection))
    assert "TypeError" in capsys.readouterr().err


class Console(io.StringIO):
    """A stream without a descriptor, as in IDLE, whose first write() fails."""

    failures = 1

    def write(self, text):
        self.failures -= 1
        if self.failures >= 0:
            raise BrokenPipeError
        return super().write(text)


def test_a_printer_goes_on_whatever_the_console_does(tmp_path, capsys):
    """It is missing, closed, or without emoji, or its first write() fails."""
    console = Console()
    with open(tmp_path / "ascii", "w+", encoding="ascii") as ascii_only:
        with open(tmp_path / "closed", "w", encoding="utf-8") as closed:
            closed.close()
        for stream in None, closed, ascii_only, console:
            printer = eventbook.Printer(stream)
            printer.start()
            for line in "first", "📧", "last":
                printer.say(line)
            printer.close(10)
            assert not printer.is_alive()
        ascii_only.seek(0)
        assert ascii_only.read() == "first\n?\nlast\n"
    assert (console.getvalue(), capsys.readouterr().out) == ("📧\nlast\n", "")


def test_at_most_100_000_lines_wait_for_a_console_that_nobody_reads():
    printer = eventbook.Printer(io.StringIO())
    for number in range(100_001):
        printer.say(number)
    assert (printer.lines.qsize(), printer.daemon) == (100_000, True)
    assert printer.lines.get() == 0


# ---- Stopping ----------------------------------------------------------------

PROGRAM = os.path.join(HERE, "eventbook.py")
ENVIRONMENT = {**os.environ, "PORT": "", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def launch(tmp_path):
    """launch(*options) starts the program; at the end it is killed if it still runs."""
    with contextlib.ExitStack() as stack:

        def start(
            *options,
            program=PROGRAM,
            shell=(),
            flags=(),
            stderr=subprocess.PIPE,
            **environment,
        ):
            """Return a Client, whose `process` is the program."""
            command = [*shell, sys.executable, *flags, program, "-p", "0", *options]
            pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "encoding": "utf-8"}
            pipes["env"] = {**ENVIRONMENT, **environment}
            process = subprocess.Popen(command, cwd=tmp_path, **pipes)
            stack.enter_context(process)
            stack.callback(process.kill)
            timer = threading.Timer(30, process.kill)  # in case that it hangs
            timer.start()
            stack.callback(timer.cancel)
            line = process.stdout.readline()
            client = Client(int(line.rpartition(":")[2] or 0), tmp_path / "log")
            client.process, client.line = process, line
            return client

        yield start


@pytest.fixture
def program(launch):
    return launch("--log", "log")


def outcome(process, timeout=20):
    """Wait for the end of a process; return (exit status, stdout, stderr)."""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def test_requests_that_have_arrived_are_answered_at_the_stop():
    """Pipelined requests are answered too; idle clients are disconnected at once."""
    with contextlib.ExitStack() as stack:
        with serving(eventbook.Store(), max_stop=30) as server:
            clients = [stack.enter_context(server.connect()) for _ in range(16)]
            assert all(exchange(client, GET).status == 200 for client in clients)
            for client in clients[1:]:
                client.sendall(GET * 3)
            begin = time.monotonic()
        assert time.monotonic() - begin < 10
        assert clients[0].recv(1) == b""
        for client in clients[1:]:
            assert statuses(read_to_end(client)) == [200] * 3


SIGNALS = [  # two signals, and how the program ends
    ("SIGTERM", "SIGTERM", 0),
    ("SIGINT", "SIGTERM", 0),
    ("SIGINT", "SIGINT", -2),
    ("SIGTERM", "SIGINT", -2),
]


@posix
@each("first, second, status", SIGNALS)
def test_a_signal_stops_the_program_and_a_second_ctrl_c_ends_it(
    launch, first, second, status
):
    """It accepts no more clients, sends what they wait for, prints what is queued, and
    leaves nothing open that Python would warn of."""
    program = launch("--log", "log", flags=["-X", "dev", "-W", "error"])
    program.create()
    make_a_long_list(program)
    with program.connect() as idle, program.connect() as late:
        late.sendall(LIST * 30 + BOOK)
        late.recv(1, socket.MSG_PEEK)
        program.settle()
        program.process.send_signal(getattr(signal, first))
        assert read_to_end(idle) == []
        with pytest.raises(OSError):
            program.connect()
        program.process.send_signal(getattr(signal, second))
        if status == 0:
            assert statuses(read_to_end(late)) == [200] * 30 + [201]
        ended = outcome(program.process)
    printed = "📧 Booking confirmation email sent for booking 1\n"
    assert ended == (status, printed if status == 0 else "", "")


@posix
def test_the_stop_prints_what_is_queued_and_accepts_nobody(program):
    """The pipe of stdout is full. A client tries to connect until the end."""
    program.create(availableTickets=2500)
    program.repeat(BOOK, 2500)
    program.process.terminate()
    assert program.process.stdout.read().count("📧") == 2500
    with pytest.raises(OSError):
        program.connect()
    assert (program.process.wait(20), program.process.stderr.read()) == (0, "")


@posix
def test_a_console_that_nobody_reads_affects_nothing(launch):
    """Both pipes are full. stderr would have said that the log cannot be written. At
    last a disk that hangs, which is a pipe here, keeps a thread busy for ever."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x"):
            pass
    os.set_blocking(writer, True)
    program = launch("--log", "log", stderr=writer)
    program.create(availableTickets=9999)
    program.repeat(BOOK, 2500)
    os.remove(program.log)
    os.mkdir(program.log)
    assert statuses([program.book(), program.list()]) == [503, 200]
    os.rmdir(program.log)
    os.mkfifo(program.log)
    with program.connect() as connection:
        connection.sendall(BOOK)
        begin = time.monotonic()
        program.process.terminate()
        assert (program.process.wait(20), time.monotonic() - begin < 5) == (0, True)
    os.close(reader)
    os.close(writer)


@posix
def test_kill_9_loses_no_confirmed_booking(program):
    """Eight clients book until the process is gone; their bookings are in the log."""
    program.create(availableTickets=10**6)
    confirmed = []

    def client(_):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                confirmed.append(program.book().body["booking"])
                if len(confirmed) >= 200:
                    program.process.kill()

    together(8, client)
    complete = program.log.read_bytes().rpartition(b"\n")[0].splitlines()
    logged = [json.loads(line)["data"] for line in complete]
    assert [booking["id"] for booking in logged] == list(range(1, len(logged) + 1))
    assert len(confirmed) >= 200
    assert all(booking in logged for booking in confirmed)


@linux
def test_a_full_disk_leaves_whole_lines_in_the_log(program):
    """A limit on the size of files cuts the lines of a booking and a cancellation."""
    import resource

    program.create()
    assert statuses([program.book(), program.book()]) == [201, 201]
    content, pid = program.log.read_bytes(), program.process.pid
    limits = len(content) + 40, resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert statuses([program.book(), program.cancel()]) == [503, 503]
    assert program.log.read_bytes() == content
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits[1:] * 2)
    assert statuses([program.book(), program.cancel()]) == [201, 200]
    assert program.log.read_bytes().startswith(content)
    assert [booking["id"] for _, booking in program.logged()] == [1, 2, 3, 1]


@posix
def test_a_small_stack_is_enough_for_nested_json(launch):
    shell = "sh", "-c", 'ulimit -s 128; exec "$@"', "sh"
    program = launch("--log", "log", shell=shell)
    program.create()
    for opening, closing in (b"[", b"]"), (b'{"":', b"}"), (b'[{"":', b"}]"):
        for number in 490, 9000:
            body = opening * number + b"1" + closing * number
            assert program.call("PUT", "/api/events/1", 1, body).status == 400
    program.process.terminate()
    assert outcome(program.process) == (0, "", "")


FAILING_SERVER = """
import eventbook, sys
class Failing(eventbook.Server):
    def get_request(self):
        if self.connections.waiting_since:
            raise MemoryError
        return super().get_request()
eventbook.Server = Failing
eventbook.main(sys.argv[2:])
"""


def test_a_failure_of_the_accepting_thread_ends_the_program(launch):
    """The first client is idle when the second one connects."""
    flags = ["-c", FAILING_SERVER]
    program = launch("--log", "log", flags=flags, PYTHONPATH=HERE)
    with program.connect() as idle, program.connect():
        assert read_to_end(idle) == []
        status, _, stderr = outcome(program.process)
    assert (status, stderr.splitlines()[-1]) == (1, "MemoryError")


# ---- Command line ------------------------------------------------------------

PORTS = [  # arguments, PORT, the port
    ([], None, 3000),
    ([], "", 3000),
    ([], "4000", 4000),
    (["--port", "5000"], "4000", 5000),
    (["-p", "0"], "x", 0),
    ([], "x", None),
    (["-p", "x"], "", None),
]


@each("arguments, variable, port", PORTS)
def test_the_port_option_overrides_the_variable(
    monkeypatch, capsys, arguments, variable, port
):
    """An invalid one ends the program with status 2 and the usage."""
    monkeypatch.setenv("PYTHON_COLORS", "0")
    monkeypatch.delenv("PORT", raising=False)
    if variable is not None:
        monkeypatch.setenv("PORT", variable)
    if port is not None:
        assert eventbook.parse_options(arguments).port == port
        return
    with pytest.raises(SystemExit, match="2"):
        eventbook.main(arguments)
    problem = "usage: (.*\\n)+.*argument -p/--port: invalid int value: 'x'\n"
    assert re.fullmatch(problem, capsys.readouterr().err)


def test_a_port_is_free_again_at_once():
    """The server closes first, so that the connection stays in TIME_WAIT."""
    with serving(eventbook.Store()) as server:
        server.talk(GET.replace(b"1.1", b"1.0"), half_close=False)
    with eventbook.Server(("127.0.0.1", server.port), None, report) as again:
        assert again.server_address[1] == server.port


@each("host, shown", [("", "localhost"), ("::1", "[::1]")])
def test_the_start_line_has_the_real_url(launch, host, shown):
    program = launch("--host", host, "--log", "log")
    if host == "::1" and not program.line:
        pytest.skip("IPv6 is not available")
    url = f"http://{shown}:{program.port}"
    assert program.line == f"eventbook is listening on {url}\n"
    assert opener.open(url, timeout=5).status == 200


def test_a_name_with_both_kinds_of_addresses_means_the_ipv4_address(monkeypatch):
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0))]
    found += [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with eventbook.Server(("both.invalid", 0), None, report) as server:
        assert server.server_address[0] == "127.0.0.1"


FAILED_STARTS = [  # arguments, what cannot be done
    (["--log", "."], "write ."),
    (["--log", "no/log"], "write no/log"),
    (["-p", "{port}"], "listen on 127.0.0.1:{port}"),
    (["-p", "65536"], "listen on 127.0.0.1:65536"),
    (["--host", "192.0.2.1"], "listen on 192.0.2.1:0"),
    (["--host", "a..b"], "listen on a..b:0"),
    (["--host", "é" * 64], f"listen on {'é' * 64}:0"),
]


@each("arguments, problem", FAILED_STARTS, ids=short)
def test_a_failed_start_says_what_to_change(
    shared_server, tmp_path, arguments, problem
):
    """The program exits with status 1 and this one line."""
    log = str(tmp_path / "log")
    arguments = [text.format(port=shared_server.port) for text in arguments]
    with pytest.raises(SystemExit) as exit:
        eventbook.main(["-p", "0", "--log", log, *arguments])
    problem = re.escape(problem.format(port=shared_server.port))
    change = "--log" if "write" in problem else "--port or --host"
    message = f"eventbook: cannot {problem} \\(.*\\); change {change}"
    assert re.fullmatch(message, exit.value.code)


@posix
def test_a_failed_start_exits_1_without_a_traceback(launch, tmp_path):
    """A pipe is no log: to open it would wait for a reader."""
    os.mkfifo(tmp_path / "pipe")
    status, stdout, stderr = outcome(launch("--log", "pipe").process)
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("eventbook: cannot write pipe (")


def test_help_has_the_options_the_users_and_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    monkeypatch.setenv("PYTHON_COLORS", "0")
    with pytest.raises(SystemExit) as exit:
        eventbook.main(["--help"])
    text = capsys.readouterr().out
    assert (exit.value.code, text[:7]) == (0, "usage: ")
    assert "eventbook: an event booking backend over HTTP\n" in text
    assert "any free port (default: $PORT, or else 3000)\n" in text
    assert f"default: {os.path.join(HERE, 'logs', 'events.log.jsonl')}\n" in text
    assert "  user-id: 1  ORGANIZER\n  user-id: 2  CUSTOMER\n" in text
    assert text.endswith("\n  curl -H 'user-id: 2' http://localhost:3000/api/events\n")
    with pytest.raises(SystemExit, match="0"):
        eventbook.main(["--version"])
    assert capsys.readouterr().out == "eventbook 1.0.0\n"


def test_the_default_log_is_beside_the_program(launch, tmp_path):
    """Here the program is a copy without a logs folder, started from another folder,
    the second time through a symbolic link."""
    (tmp_path / "home").mkdir()
    copy, link = shutil.copy(PROGRAM, tmp_path / "home"), tmp_path / "link.py"
    link.symlink_to(copy)
    for lines, path in (1, copy), (2, link):
        program = launch(program=path)
        program.log = tmp_path / "home" / "logs" / "events.log.jsonl"
        assert statuses([program.create(), program.book()]) == [201, 201]
        assert len(program.logged()) == lines
    assert not (tmp_path / "logs").exists()


AUDITED = """
import runpy, sys
def hook(name, arguments):
    if name.startswith("socket.gethost"):
        sys.stderr.write(f"{name} {arguments}")
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@linux
def test_what_main_connects(launch):
    """The start asks no name server and chooses a CPU. Times are UTC and GMT in every
    time zone. stdout has the notifications, and stderr the problems."""
    audited = {"flags": ["-c", AUDITED], "TZ": "Asia/Tokyo"}
    program = launch("--log", "log", **audited)
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        cpus, id = sorted(os.sched_getaffinity(0)), program.process.pid
        assert os.sched_getaffinity(id) == {cpus[id % len(cpus)]}
    program.create()
    booked = program.book()
    date = email.utils.parsedate_to_datetime(booked.headers["date"]).timestamp()
    stamp = json.loads(program.log.read_bytes())["timestamp"]
    logged = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
    assert booked.headers["date"].endswith(" GMT") and abs(date - logged) < 5
    assert abs(logged - time.time()) < 60
    os.remove(program.log)
    os.mkdir(program.log)
    assert program.book().status == 503
    program.process.terminate()
    status, stdout, stderr = outcome(program.process)
    assert stdout == "📧 Booking confirmation email sent for booking 1\n"
    assert (status, stderr.count("\n")) == (0, 1)
    assert stderr.startswith("eventbook: cannot write the log: ")


# ---- README ------------------------------------------------------------------


@posix
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_session_in_the_readme_is_what_happens(program):
    """curl -q reads no .curlrc, which could change what it prints."""
    steps = readme(r"^\$ (curl .*)\n((?:[^$`].*\n)*)")
    assert len(steps) >= 5
    for command, expected in steps:
        command = command.replace("localhost:3000", f"127.0.0.1:{program.port}")
        command = command.replace("curl ", "curl -q -s --noproxy '*' ", 1)
        output = subprocess.check_output(["sh", "-c", command])
        assert output.decode() == expected, command
    program.process.terminate()
    (console,) = readme(r"^```text\n((?:[^`].*\n)*)")
    assert outcome(program.process) == (0, console, "")


def test_the_limits_in_the_readme_are_those_of_the_code():
    connections, server = eventbook.Connections, eventbook.Server
    limits = connections.max_wait_if_full, server.max_stop, connections.max_wait
    assert limits == (1, 2, 16)
    for limit in limits:
        assert readme(rf"\b{limit} s\b")
