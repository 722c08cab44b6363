"""Tests of eventbook: its contract in runnable form, against a real server.

    python -m pytest                     # the whole suite takes about 25 seconds
    python -m pytest -k assignment       # the assignment's nine test cases

The fixture `server` is a server with a log and a console, in a thread of this process.
Event 1 exists from the start, with three tickets. Its methods send requests and return
a Reply(status, body, headers, raw), where body is the JSON and raw its bytes:

    server.create(title="x")             POST /api/events, as user 1
    server.update(1, title="x")          PUT /api/events/1, as user 1
    server.read(1)                       GET /api/events/1, as user 1
    server.list("?limit=2")              GET /api/events?limit=2, as user 2
    server.book(1, user=3)               POST /api/events/1/book
    server.cancel(1, user=3)             DELETE /api/bookings/1
    server.call("PATCH", "/x", 2, body)  any other request
    server.talk(raw("GET", "/") + b"x")  bytes over a socket; returns a list of Replies
    exchange(connection, GET)            a request on a socket that stays open
    together(8, work)                    work(0) to work(7), in threads at the same time
    server.logged(), server.printed()    the log, and all lines on stdout (call it last)

`@with_server(connection_limit=8)` changes limits of the server. `shared_server` is one
server for all tests that change nothing. `launch` starts the program as a process, for
signals and exit statuses. GET, LIST, CREATE and BOOK are the bytes of valid requests.
"""

import contextlib
import email.utils
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


class Client:
    """Sends requests to the server on a port."""

    def __init__(self, port, log=None):
        self.port, self.log = port, log

    def create(self, user=1, **changes):
        return self.call("POST", "/api/events", user, {**EVENT, **changes})

    def update(self, id=1, /, headers=None, **changes):
        return self.call("PUT", f"/api/events/{id}", 1, changes, headers)

    def read(self, id=1, headers=None):
        return self.call("GET", f"/api/events/{id}", 1, headers=headers)

    def list(self, query="", user=2):
        return self.call("GET", f"/api/events{query}", user)

    def book(self, event=1, user=2, key=None):
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.call("POST", f"/api/events/{event}/book", user, headers=headers)

    def cancel(self, id=1, user=2):
        return self.call("DELETE", f"/api/bookings/{id}", user)

    def bookings_of_event(self, id=1, query=""):
        return self.call("GET", f"/api/events/{id}/bookings{query}", 1)

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
            check_common_headers(replies[-1])
    return replies


def check_common_headers(reply):
    """Check the headers of every response with a body, including the parser's own."""
    if reply.status not in (100, 304):
        assert reply.headers["content-type"] == "application/json; charset=utf-8"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        date = email.utils.parsedate_to_datetime(reply.headers["date"])
        assert abs(date.timestamp() - time.time()) < 5
        assert len(reply.raw) == int(reply.headers["content-length"])
        assert reply.raw.endswith(b"\n") and "python" not in str(reply).lower()


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
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


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


def eventually(condition):
    """Poll until a condition holds that nothing announces, such as a thread's end."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


@contextlib.contextmanager
def frequent_switches():
    """Have threads take turns as often as possible, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def together(number, work):
    """Return the results of work(0), work(1), ..., run in threads at the same time."""
    start = threading.Barrier(number, timeout=20).wait
    with frequent_switches(), ThreadPoolExecutor(number, initializer=start) as pool:
        return list(pool.map(work, range(number)))


@contextlib.contextmanager
def serving(store, log=None, **limits):
    """Run a server in a thread."""
    server = eventbook.Server(("127.0.0.1", 0), store)
    thread = threading.Thread(target=server.serve_forever, args=[0.002])
    thread.start()
    try:
        client = Client(server.server_address[1], log)
        client.create()  # before the limits, which may be small
        for name, value in limits.items():
            setattr(server, name, value)
        yield client
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextlib.contextmanager
def serving_all(folder, **limits):
    """Run a server with log and console, connected as main() does it."""
    with contextlib.ExitStack() as stack:
        printers = {}
        for name in "stdout", "stderr":
            stream = stack.enter_context(open(folder / name, "a", encoding="utf-8"))
            printers[name] = eventbook.Printer(stream)
            printers[name].start()
            stack.callback(printers[name].close, 10)

        def lines(name):
            printers[name].close(10)
            return (folder / name).read_text("utf-8").splitlines()

        store = eventbook.open_store(str(folder / "log"), *printers.values())
        server = stack.enter_context(serving(store, folder / "log", **limits))
        server.printed = lambda: lines("stdout")
        server.problems = lambda: lines("stderr")
        yield server


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


def with_server(**limits):
    """Decorate a test so that its server has other limits."""
    return each("server", [limits], indirect=True, ids=[str(limits)])


@pytest.fixture(scope="module")
def shared_server():
    """A server for tests that change nothing; customer 2 has all tickets of event 1."""
    with serving(eventbook.Store()) as server:
        assert [server.book().status for _ in "123"] == [201] * 3
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


def test_json_has_its_keys_in_order_and_no_spaces(server):
    event = '{"id":1,"title":"Tech Conference 2026","date":"2026-02-15",'
    event += '"availableTickets":3}'
    assert server.read().raw == f"{event}\n".encode()


def test_a_location_leads_to_what_was_created(server):
    created, booked = server.create(), server.book()
    assert created.headers["location"] == "/api/events/2"
    assert server.read(2).headers["etag"] == created.headers["etag"]
    assert booked.headers["location"] == "/api/bookings/1"
    assert server.call("GET", "/api/bookings/1", 2).body == booked.body["booking"]


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


@each("method, path, roles", ROUTES)
def test_a_route_rejects_all_but_its_roles(shared_server, method, path, roles):
    for user, role in ROLES.items():
        reply = shared_server.call(method, path.replace(":id", "9"), user, b"!")
        expected = (403,) if role else (401,)
        expected = (200, 400, 404) if not roles or role in roles else expected
        assert reply.status in expected, user


def test_the_root_lists_the_routes(shared_server):
    root = shared_server.call("GET", "/").body
    routes = [
        (route["method"], route["path"], route["roles"]) for route in root["routes"]
    ]
    assert (root["service"], root["version"]) == ("eventbook", eventbook.VERSION)
    assert root["routes"][8]["operation"] == "Get your booking."
    assert routes == ROUTES


USERS = cases("|0|4|+2|02|2.0|2,2|2 2|2\r\nUser-Id: 2|２|²")


@each("user", USERS)
def test_a_malformed_or_unknown_user_id_is_unauthorized(shared_server, user):
    (reply,) = shared_server.talk(raw("GET", "/api/events", f"user-id: {user}"))
    assert (reply.status, reply.body) == (401, UNAUTHORIZED)
    assert reply.headers["www-authenticate"] == "user-id"


OLD, NO_KEY = {"If-Match": '"x"'}, {"Idempotency-Key": ""}
CHUNKED = {"Transfer-Encoding": "chunked"}
EXPECTED = "Expecting value: line 1 column 1 (char 0)"
CHECKS = [  # most requests fail several checks; the first of them decides
    (411, "Transfer-Encoding unsupported", "BREW", "/x", None, None, CHUNKED),
    (413, "Body too large", "BREW", "/x", None, b"[" * 100_000, {}),
    (501, "Not Implemented", "BREW", "/x", None, b"!", {}),
    (404, "Not found", "PATCH", "/x", None, b"!", {}),
    (405, "Method not allowed", "PATCH", "/api/events", None, b"!", {}),
    (401, "Unauthorized", "POST", "/api/events", None, b"!", {}),
    (403, "Access denied", "POST", "/api/events", 2, b"!", {}),
    (400, f"Invalid JSON: {EXPECTED}", "PUT", "/api/events/9", 1, b"!", OLD),
    (404, "Event not found", "PUT", "/api/events/9", 1, {"x": 1}, OLD),
    (404, "Event not found", "POST", "/api/events/9/book", 2, None, NO_KEY),
    (404, "Event not found", "GET", "/api/events/9/bookings?limit=x", 1, None, {}),
    (404, "Booking not found", "DELETE", "/api/bookings/9", 3, b"!", {}),
    (403, "Access denied", "DELETE", "/api/bookings/1", 3, b"!", {}),
    (403, "Access denied", "GET", "/api/bookings/1", 3, None, {}),
    (412, "Event has changed", "PUT", "/api/events/1", 1, {"x": 1}, OLD),
    (400, "Validation failed", "POST", "/api/events/1/book", 2, None, NO_KEY),
    (400, "Booking failed: sold out", "POST", "/api/events/1/book", 2, b"!", {}),
]


@each("status, error, method, path, user, body, headers", CHECKS)
def test_the_first_check_that_fails_decides(
    shared_server, status, error, method, path, user, body, headers
):
    reply = shared_server.call(method, path, user, body, headers)
    assert (reply.status, reply.body["error"]) == (status, error)


TOO_LONG = "9" * 601
UNKNOWN_PATHS = cases(
    "/x|/api|/API/events|/api/events/x|/api/events/-1|/*|/api/events//1|//api/events"
    "|/api/events//|/api/events/1/book/2|/api/events/:id|/api/events/%31"
)


@each("path", [*UNKNOWN_PATHS, f"/api/events/{TOO_LONG}"], ids=short)
def test_an_unknown_path_is_not_found(shared_server, path):
    assert shared_server.call("GET", path)[:2] == (404, {"error": "Not found"})


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


@each("method", ["BREW", "get", "Get", "PROPFIND", "GETS", "X-1"])
def test_a_method_that_http_does_not_define_is_not_implemented(shared_server, method):
    assert shared_server.call(method, "/api/events", 2).status == 501


@each("path, roles", [route[1:] for route in ROUTES if route[0] == "GET"])
def test_head_has_the_headers_of_get_and_no_body(shared_server, path, roles):
    user, path = 1 if ORGANIZER in roles else 2, path.replace(":id", "1")
    get, head = (shared_server.call(method, path, user) for method in ("GET", "HEAD"))
    assert (get.status, head.status, head.body) == (200, 200, None)
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


@each("header", ["X: y", "Content-Length: 99999", "Expect: 100-continue"])
def test_an_error_response_to_head_has_no_body(shared_server, header):
    with shared_server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(GET.replace(b"GET / ", b"HEAD /x ")[:-2])
        connection.sendall(f"{header}\r\nConnection: close\r\n\r\n".encode())
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
    ("title", TITLE, ["", " \t\n", "x" * 201, 5, None, True, ["x"]]),
    ("availableTickets", TICKETS, [0, -1, 10**9 + 1, True, 3.0, 1e9, "3", None]),
    ("date", DATE, [None, 20260215, [], "2026-02-15\n", " 2026-02-15"]),
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
    ("title", ["x", "x" * 200, "🎟️", '"\\/', "\u0001", "<b>"]),
    ("availableTickets", [1, 10**9]),
    ("date", ["0001-01-01", "9999-12-31", "2024-02-29", "2026-02-15T19:30"]),
    ("date", ["2026-02-15T00:00Z", "2026-02-15T19:30:59", "2026-02-15T19:30+05:30"]),
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
    created = shared_server.call("POST", "/api/events", 1, {"x": 1}).body
    assert created["details"] == {
        "title": TITLE,
        "date": DATE,
        "availableTickets": TICKETS,
    }
    updated = shared_server.update(availableTickets=-1, id=2, x=1).body
    assert updated["details"] == {
        "availableTickets": "must be an integer from 0 to 1,000,000,000",
        "id": "must be the id in the path",
        "x": "unknown field",
    }


def test_create_ignores_unknown_fields(server):
    assert server.create(id=7, colour="red")[:2] == (201, {"id": 2, **EVENT})


@each("name", ["colour", "Title", "id", "etag", "__class__"])
def test_update_rejects_unknown_fields_and_other_ids(shared_server, name):
    for value in 2, True, "1", 1.0:
        reply = shared_server.update(**{"title": "New", name: value})
        assert (reply.status, list(reply.body["details"])) == (400, [name])
    assert shared_server.read().body["title"] == EVENT["title"]


@each("change", [{"title": "New"}, {"date": "2027-01-01"}, {"availableTickets": 0}])
def test_update_changes_only_the_given_fields(server, change):
    updated = server.update(**change).body["event"]
    assert server.read().body == updated == {"id": 1, **EVENT, **change}
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


def test_an_event_can_be_read_edited_and_put_back(server):
    read = server.read()
    edited = {**read.body, "title": "New"}
    assert server.update(**edited).body["event"] == edited


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
]


@each("error, bodies", INVALID_JSON, ids=short)
def test_invalid_json_is_a_bad_request(shared_server, error, bodies):
    """The message is for a client: it has no codec names and no advice on Python."""
    for body in bodies:
        for method, path in ("POST", "/api/events"), ("PUT", "/api/events/1"):
            reply = shared_server.call(method, path, 1, body)
            assert reply.status == 400, body
            assert reply.body["error"].startswith(f"Invalid JSON: {error}"), body
            assert not re.search("codec|utf-8-sig|sys[.]", reply.body["error"])


@each("body", [b"[" + BODY + b"]", b'"x"', b"1", b"null"])
def test_a_json_body_must_be_an_object(shared_server, body):
    reply = shared_server.call("POST", "/api/events", 1, body)
    assert reply[:2] == (400, {"error": "The JSON body must be an object"})


DEEP = [b"[" * 30_000 + b"]" * 30_000, b'{"x":' * 10_000 + b"1" + b"}" * 10_000]


@each("body", DEEP, ids=short)
def test_deeply_nested_json_is_a_bad_request(shared_server, body):
    """How deep is too deep depends on the Python version."""
    assert shared_server.call("PUT", "/api/events/1", 1, body).status == 400


def test_a_byte_order_mark_is_ignored(server):
    marked = "\ufeff".encode() + BODY
    assert server.call("POST", "/api/events", 1, marked).status == 201
    for body in marked, "\ufeff".encode():
        assert server.call("PUT", "/api/events/1", 1, body).status == 200


def test_the_content_type_is_ignored(server):
    for content_type in "text/plain", "application/x-www-form-urlencoded", "":
        headers = {"Content-Type": content_type}
        assert server.call("POST", "/api/events", 1, BODY, headers).status == 201


def test_book_and_cancel_ignore_a_body(server):
    for number, body in enumerate([None, b"!", b"[1]", b"\xff" * 60_000], start=1):
        assert server.call("POST", "/api/events/1/book", 2, body).status == 201
        assert server.call("DELETE", f"/api/bookings/{number}", 2, body).status == 200


# ---- Retries -----------------------------------------------------------------


def test_a_retry_with_a_key_books_once(server):
    """The first response is repeated even after the booking was cancelled."""
    first = server.book(key="~" * 255)
    assert first.status == 201
    assert server.book(key="~" * 255)[:2] == first[:2]
    server.cancel()
    assert server.book(key="~" * 255)[:2] == first[:2]
    assert server.read().body == {"id": 1, **EVENT}
    assert [kind for kind, _ in server.logged()] == ["created", "cancelled"]
    assert len(server.printed()) == 1


def test_a_key_belongs_to_one_event_and_one_customer(server):
    server.create()
    assert server.book(event=1, key="k").status == 201
    error = {"error": "Idempotency-Key was used for another event"}
    assert server.book(event=2, key="k")[:2] == (422, error)
    other = server.book(event=2, user=3, key="k").body["booking"]
    assert other == {"id": 2, "eventId": 2, "customerId": 3}


def test_a_failed_booking_does_not_use_up_its_key(server):
    """A key that was used is remembered even when the event is sold out."""
    for tickets, status in (0, 400), (1, 201), (0, 201):
        server.update(availableTickets=tickets)
        assert server.book(key="k").status == status


@each("key", ["", "a b", "a\tb", "ä", "x" * 256], ids=short)
def test_a_key_has_1_to_255_visible_ascii_characters(shared_server, key):
    details = {"Idempotency-Key": "must be 1 to 255 visible ASCII characters"}
    reply = shared_server.book(key=key)
    assert reply.body == {"error": "Validation failed", "details": details}


def test_the_newest_ten_thousand_keys_are_remembered():
    """After 10,001 keys the second one is still known; the first one books again."""
    store, ask = eventbook.Store(), eventbook.Request("", {}, BODY, 1, 2)
    store.create(ask)
    store.update(ask._replace(body=b'{"availableTickets":20000}'))
    keys = [{"idempotency-key": str(key)} for key in [*range(10_001), 1, 0]]
    bookings = [store.book(ask._replace(headers=key)) for key in keys]
    assert [booking.id for booking in bookings] == [*range(1, 10_002), 2, 10_002]


# ---- Preconditions -----------------------------------------------------------


def test_an_etag_changes_with_the_event_and_never_returns(server):
    """It does not return with the same content, nor in another run of the server."""
    with serving(eventbook.Store()) as another_run:
        tags = {another_run.create().headers["etag"]}
    for change in (
        lambda: server.update(title="New"),
        lambda: server.book(),
        lambda: server.cancel(),
        lambda: server.update(availableTickets=0),
        lambda: server.update(**EVENT),
    ):
        tags.add(server.read().headers["etag"])
        assert change().status in (200, 201)
    tags.add(server.read().headers["etag"])
    assert len(tags) == 7
    assert all(re.fullmatch(r'"[0-9a-f]{12}-\d+"', tag) for tag in tags)


def test_an_etag_stays_while_the_event_stays(server):
    tag = server.read().headers["etag"]
    server.create()
    assert server.update().headers["etag"] == tag
    assert server.update(**EVENT).headers["etag"] == tag
    assert server.read().headers["etag"] == tag


PRECONDITIONS = [  # TAG is the current ETag; the status of a PUT, and of a GET
    ("If-Match", ["TAG", "*", '"old", TAG'], 200, 200),
    ("If-Match", ['"old"', "W/TAG", 'W/TAG, "*"', "xTAG", "TAGTAG", ""], 412, 412),
    ("If-None-Match", ["TAG", "*", '"old",TAG', 'W/"old", W/TAG'], 412, 304),
    ("If-None-Match", ['"old"', '"*"', "xTAG", "w/TAG", ""], 200, 200),
]


@each("name, values, put_status, get_status", PRECONDITIONS)
def test_if_match_and_if_none_match_guard_put_and_get(
    server, name, values, put_status, get_status
):
    """A 412 and a 304 carry the current ETag, and nothing has changed then."""
    server.book()
    for number, value in enumerate(values):
        before, title = server.read(), str(number)
        headers = {name: value.replace("TAG", before.headers["etag"])}
        get = server.read(headers=headers)
        assert (get.status, get.headers["etag"]) == (get_status, before.headers["etag"])
        put, after = server.update(headers=headers, title=title), server.read()
        assert (put.status, put.headers["etag"]) == (put_status, after.headers["etag"])
        assert (after.body["title"] == title) == (put_status == 200)
    notified = [line for line in server.printed() if line.startswith("🔔")]
    assert len(notified) == len(values) * (put_status == 200)


def test_a_304_has_no_body(shared_server):
    for method in "GET", "HEAD":
        reply = shared_server.call(
            method, "/api/events/1", 1, None, {"If-None-Match": "*"}
        )
        assert (reply.status, reply.raw) == (304, b"")
        assert "content-length" not in reply.headers


# ---- Lists -------------------------------------------------------------------


PAGES = [  # query, ids, total
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


def test_a_list_has_limit_offset_and_total(server):
    """Events 2 and 4 are sold out. Each query is made twice, for the cached list."""
    for event in 2, 3, 4, 5:
        server.create(availableTickets=1)
    assert [server.book(event).status for event in (2, 4)] == [201, 201]
    for query, ids, total in PAGES * 2:
        listed = server.list(query)
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
    "|available=True"
)


@each("query", [*INVALID_QUERIES, f"offset={TOO_LONG}"], ids=short)
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
    second = server.bookings_of_customer(3, "?offset=1&limit=1")
    assert second.body == [{"id": 3, "eventId": 1, "customerId": 3}]
    assert second.headers["x-total-count"] == "2"


def test_the_cost_of_a_list_is_proportional_to_its_length():
    """The seconds for each event, after a booking, are the fastest of five lists."""
    costs = []
    for number in 1000, 12_000:
        store = eventbook.Store()
        ask = eventbook.Request("", {}, BODY, 1, 2)
        for _ in range(number):
            store.create(ask)
        store.list_events(ask)
        durations = []
        for _ in range(5):
            store.cancel(ask._replace(id=store.book(ask).id))
            begin = time.thread_time()
            store.list_events(ask)
            durations.append(time.thread_time() - begin)
        costs.append(min(durations) / number)
    assert costs[1] < 4 * costs[0]


# ---- Races -------------------------------------------------------------------
# A model and many clients: without Store's lock, the tests with many clients fail.


class Model:
    """A model of the server, so simple that it is obviously correct."""

    def __init__(self):
        self.events, self.bookings, self.last = {1: {"id": 1, **EVENT}}, {}, 0

    def create(self, **changes):
        event = {"id": len(self.events) + 1, **EVENT, **changes}
        self.events[event["id"]] = event
        return 201, dict(event)

    def update(self, id, **changes):
        if id not in self.events:
            return 404, NO_EVENT
        self.events[id].update(changes)
        return 200, {"message": "Event updated", "event": dict(self.events[id])}

    def book(self, event, user):
        if event not in self.events:
            return 404, NO_EVENT
        if not self.events[event]["availableTickets"]:
            return 400, SOLD_OUT
        self.events[event]["availableTickets"] -= 1
        self.last += 1
        booking = {"id": self.last, "eventId": event, "customerId": user}
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

    def bookings_with(self, key, value):
        return [booking for booking in self.bookings.values() if booking[key] == value]


@each("seed", range(2))
def test_a_random_history_has_the_responses_of_the_model(server, seed):
    chance, model = random.Random(seed), Model()
    for _ in range(100):
        event, booking = chance.randint(1, len(model.events) + 1), chance.randint(1, 40)
        user, changes = (
            chance.choice([2, 3]),
            {"availableTickets": chance.randint(1, 5)},
        )
        operation, arguments, changes = chance.choice(
            [("create", [], changes), ("update", [event], changes)]
            + [("book", [event, user], {}), ("cancel", [booking, user], {})] * 3
        )
        expected = getattr(model, operation)(*arguments, **changes)
        reply = getattr(server, operation)(*arguments, **changes)
        assert reply[:2] == expected
        assert server.list().body == list(model.events.values())
        customers = server.bookings_of_customer(user).body
        assert customers == model.bookings_with("customerId", user)
        if event in model.events:
            events = server.bookings_of_event(event).body
            assert events == model.bookings_with("eventId", event)


def test_a_concurrent_history_is_one_that_the_model_has(server):
    """Replayed in the order of the log, the model ends with the same events."""
    model, confirmed = Model(), []
    for _ in "23":
        server.create()
        model.create()

    def client(number):
        chance = random.Random(number)
        for _ in range(40):
            user = chance.choice([2, 3])
            if chance.random() < 0.6:
                reply = server.book(chance.randint(1, 3), user)
            else:
                reply = server.cancel(chance.randint(1, 60), user)
            confirmed.extend([reply.body["booking"]] if reply.status < 300 else [])

    together(12, client)
    for kind, booking in server.logged():
        id, event, user = booking.values()
        made = model.book(event, user) if kind == "created" else model.cancel(id, user)
        assert made[1].get("booking") == booking
    assert list(model.events.values()) == server.list().body
    logged = [booking for _, booking in server.logged()]
    assert sorted(map(str, confirmed)) == sorted(map(str, logged))


def test_concurrent_bookings_sell_each_ticket_once(server):
    """The log has the bookings in the order of their ids."""
    server.update(availableTickets=200)

    def book(number):
        replies = iter(lambda: server.book(user=2 + number % 2)[:2], (400, SOLD_OUT))
        return [body["booking"]["id"] for _, body in replies]

    booked = [booking for ids in together(16, book) for booking in ids]
    logged = [booking["id"] for _, booking in server.logged()]
    assert sorted(booked) == logged == list(range(1, 201))
    assert server.read().body["availableTickets"] == 0
    assert len(server.printed()) == 200


def test_concurrent_creates_give_each_event_an_id(server):
    together(12, lambda _: server.repeat(CREATE, 60))
    assert [event["id"] for event in server.list().body] == list(range(1, 722))


@contextlib.contextmanager
def serving_slowly():
    """Run a server that waits between the check and the change of an operation."""
    store = eventbook.Store()
    for name in "booking.created", "booking.cancelled", "event.updated":
        store.on(name, lambda *_: time.sleep(0.02))
    with serving(store) as server:
        yield server


def test_only_one_of_many_slow_cancellations_succeeds():
    with serving_slowly() as server:
        server.book()
        replies = together(8, lambda _: server.cancel().status)
        assert sorted(replies) == [200] + [404] * 7
        assert server.read().body == {"id": 1, **EVENT}


def test_only_one_of_many_slow_updates_with_one_etag_succeeds():
    with serving_slowly() as server:
        headers = {"If-Match": server.read().headers["etag"]}

        def update(number):
            return server.update(headers=headers, title=str(number)).status

        replies = together(8, update)
        assert sorted(replies) == [200] + [412] * 7
        assert server.read().body["title"] == str(replies.index(200))


def test_concurrent_bookings_with_one_key_book_once(server):
    for key, left in ("a", 2), ("b", 1), ("c", 0):
        replies = together(16, lambda _, key=key: server.book(key=key)[:2])
        assert replies == [(201, replies[0][1])] * 16
        assert server.read().body["availableTickets"] == left
    assert [booking["id"] for _, booking in server.logged()] == [1, 2, 3]
    assert len(server.printed()) == 3


@each("path, user", [("/api/events/1/bookings", 1), ("/api/bookings", 2)])
def test_bookings_can_be_listed_while_others_cancel(server, path, user):
    """Each list is complete: it has the 200 bookings that nobody cancels."""
    server.update(availableTickets=500)
    server.repeat(BOOK, 500)
    cancel = [raw("DELETE", f"/api/bookings/{id}", user=2) for id in range(201, 501)]
    lists = raw("GET", path, user=user) * 100
    replies = together(4, lambda n: server.talk(lists if n else b"".join(cancel)))
    assert [len(listed) for listed in replies[1:]] == [100] * 3
    for reply in itertools.chain(*replies[1:]):
        ids = [booking["id"] for booking in reply.body]
        assert ids[:200] == list(range(1, 201)) and ids == sorted(ids)
    assert statuses(replies[0]) == [200] * 300


def test_a_list_shows_every_change_that_has_been_answered(server):
    """In each turn two clients change events while two others list them."""
    server.repeat(CREATE, 3000)
    query = "?available=true&limit=1"
    listing = raw("GET", f"/api/events{query}", user=2)
    with frequent_switches(), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in "1234"]
        for turn in range(200):
            body = b'{"title":"%d"}' % turn
            change = [raw("PUT", f"/api/events/{n}", user=1, body=body) for n in (2, 1)]
            for client, data in zip(clients, [change[0], listing, change[1], listing]):
                client.sendall(data)
            assert statuses(map(receive, clients)) == [200] * 4
            assert server.list(query).body[0]["title"] == str(turn)


# ---- Framing -----------------------------------------------------------------
# Each malformed request stands between two valid ones. The first gets its response, the
# second is not read: nobody can say where it begins.

REQUEST_LINES = {  # a Host follows
    400: "Host: a|GET|GET /|GET / |/ HTTP/1.1|GET HTTP/1.1|\n| | GET / HTTP/1.1"
    "|GET  / HTTP/1.1|GET /  HTTP/1.1|GET / HTTP/1.1 |GET\t/ HTTP/1.1|GET /\tHTTP/1.1"
    "|GET / x HTTP/1.1|GET / HTTP/1.1x|GET / HTTP|GET / HTTP/1|GET / HTTP/.1|\x16\x03"
    "|GET / HTTP/1.1.1|GET / HTTP/+1.1|GET / HTTP/01.01|GET / HTTP/1.١|GET / http/1.1"
    "|(GET) / HTTP/1.1|GÄT / HTTP/1.1|GET: / HTTP/1.1|GET\0 / HTTP/1.1|GET / HTTP/0.9"
    "|GET /ä HTTP/1.1|GET /\0 HTTP/1.1|GET /\x7f HTTP/1.1|GET\xa0/\xa0HTTP/1.1"
    "|GET /\nX: y HTTP/1.1|GET / HTTP/1.1\n|GET api/events HTTP/1.1|GET * HTTP/1.1"
    "|OPTIONS ** HTTP/1.1|GET ? HTTP/1.1|CONNECT a:80 HTTP/1.1|GET http:// HTTP/1.1"
    "|GET http:/a HTTP/1.1|GET http://u@a/ HTTP/1.1|GET http://a:b/ HTTP/1.1",
    414: "GET /" + "x" * 8192 + " HTTP/1.1|" + "x" * 9000 + "|" + "x" * 70_000,
    505: "GET / HTTP/2.0|GET / HTTP/1.2|GET / HTTP/9.9|PRI * HTTP/2.0",
}
HEADER_LINES = {  # a Host precedes
    400: "X : 1|X\t: 1| X: 1|\tX: 1|X|X 1|: 1|=: 1| |\t|X@Y: 1|X(Y): 1|Xä: 1|X/Y: 1"
    '|\xa0X: 1|X[:1|"X": 1|X\\: 1|X: \0|X: \x01|X: \x7f|X: \x1b[31m|X: \x0b|\0X: 1'
    "|X\0: 1|X: a\n b|X: a\rb|X: a\nY: b|X: a\rContent-Length: 9|X: a\r|X: a\r\n b"
    "|X: a\r\n\tb|X: a\r\n  |Host: a|Host: b|HOST: a",
    431: "X: " + "x" * 16384 + "|" + "\r\n".join(["X: 1"] * 3000),
}
HOSTS = {  # there are no other headers
    400: "X: 1|Host:|Host: |Host: a, b|Host: a,b|Host: u@a|Host: a/b|Host: http://a"
    "|Host: a b|Host: a:b|Host: a:80:80|Host: [::1|Host: ::1|Host: a?b|Host: a#b"
    '|Host: a\\b|Host: ä|Host: <a>|Host: a:-1|Host: [a]b|Host: "a"|Host: a:123456',
}
LENGTHS = {  # the value of Content-Length, and what follows it
    400: '+2|-2|2 2|2,2|2, 2|2_0|0x2|2.0|²|２| |"2"|2;|\xa02|2\r\nContent-Length: 2'
    "|2\r\ncontent-length: 3|2\r\nTransfer-Encoding: chunked"
    "|0\r\nTransfer-Encoding: chunked",
    413: "65537|99999999999999999999|" + "9" * 5000,
}
CODINGS = {  # the value of Transfer-Encoding, and what follows it
    400: "\x0bchunked|chunked\r\nContent-Length: 2|chunked\r\n fold|x\0",
    411: "chunked|Chunked|identity|gzip, chunked|x| |chunked;q=1",
}
WHOLE_REQUESTS = {
    400: "GET / HTTP/1.1\nHost: a\n\n|GET / HTTP/1.1\r\nHost: a\n\r\n|\n"
    "|\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n|GET / HTTP/1.1\rHost: a\r\r\n\n"
    "|GET / HTTP/1.1\r\nHost: a\r\n\n",
    431: "GET / HTTP/1.1\r\nX: " + "x" * 16_381 + "\r\nHost: a\r\n\r\n",
}
MALFORMED = [
    (status, encoded(template.replace("...", case)))
    for template, table in [
        ("...\r\nHost: a\r\n\r\n", REQUEST_LINES),
        ("GET / HTTP/1.1\r\nHost: a\r\n...\r\n\r\n", HEADER_LINES),
        ("GET / HTTP/1.1\r\n...\r\n\r\n", HOSTS),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ...\r\n\r\n{}", LENGTHS),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ...\r\n\r\n{}", CODINGS),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: ...\r\n\r\n{}", CODINGS),
        ("...", WHOLE_REQUESTS),
    ]
    for status in table
    for case in cases(table[status])
]


@each("status, malformed", MALFORMED, ids=short)
def test_a_malformed_request_is_rejected_and_closed(shared_server, status, malformed):
    valid, error = shared_server.talk(GET + malformed + GET, half_close=False)
    assert (valid.status, error.status) == (200, status)
    assert error.headers["connection"] == "close"
    assert statuses(shared_server.talk(malformed, half_close=False)) == [status]


ERRORS = [
    ("Malformed request line", b"GET /\r\n\r\n"),
    ("Use HTTP/1.0 or HTTP/1.1", b"GET / HTTP/2.0\r\n\r\n"),
    ("Exactly one valid Host is required", b"GET / HTTP/1.1\r\n\r\n"),
    ("Request line too long", b"GET /" + b"x" * 8192),
    ("(Request-)?URI Too Long", b"x" * 70_000 + b"\n"),
    ("Invalid request target", raw("GET", "a")),
    ("Malformed or incomplete header line", raw("GET", "/", " X: 1")),
    ("Headers too large", raw("GET", "/", "X: " + "x" * 16384)),
    ("Invalid Content-Length", raw("GET", "/", "Content-Length: x")),
    ("Incomplete body", raw("GET", "/", "Content-Length: 9")),
    (
        "Event has not changed",
        raw("PUT", "/api/events/1", "If-None-Match: *", user=1),
    ),
]


@each("error, wrong", ERRORS, ids=short)
def test_an_error_response_says_what_is_wrong(shared_server, error, wrong):
    (reply,) = shared_server.talk(wrong)
    assert re.fullmatch(error, reply.body["error"])


def of_size(request_line, headers):
    """Return a request whose request line and headers have these sizes in bytes."""
    header = "X: " + "x" * (headers - len("Host: a\r\nX: \r\n"))
    return raw("GET", "/?" + "x" * (request_line - len("GET /? HTTP/1.1")), header)


VALID_HOSTS = cases(" \t a \t |[::1]:3000| localhost:3000|a:| A-b.c~%20:65535")
TARGETS = cases("http://a/|HTTP://A:80/|https://a?x|/?a=b?c/d&%zz|http://[::1]:80")
KEEPS_OPEN = [
    *[(200, encoded(f"GET / HTTP/1.1\r\nHost:{host}\r\n\r\n")) for host in VALID_HOSTS],
    *[(200, raw("GET", target)) for target in TARGETS],
    *[(200, raw("GET", "/", body=body)) for body in (GET, b" " * 65536)],
    (200, of_size(8192, 99)),
    (200, b"\r\n" + of_size(8192, 16384)),
    (200, raw("GET", "/", "X:", "X: a\tb", "!#$%&'*+-.^_`|~09azAZ: 1", "Y: ä")),
    (200, raw("GET", "/", "Content-Length: 0000000002") + b"xx"),
    (200, raw("GET", "/", "Connection: keep-alive", 'Connection: TE, closed, "close"')),
    (200, raw("GET", "/", "Connection:", *["X: 1"] * 2000)),
    (304, raw("GET", "/api/events/1", "If-None-Match: *", user=1)),
    (304, raw("HEAD", "/api/events/1", "If-None-Match: *", user=1)),
    (400, raw("POST", "/api/events", user=1, body=GET)),
    (401, raw("GET", "/api/events")),
    (403, raw("GET", "/api/bookings", user=1)),
    (404, raw("OPTIONS", "*")),
    (405, raw("PATCH", "/")),
]
CLOSES = [
    (200, b"GET / HTTP/1.0\r\n\r\n"),
    (200, b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"),
    (200, raw("GET", "/", "Connection: x ,\tClose ,")),
    (200, raw("GET", "/", "Connection: keep-alive", "Connection: close")),
    (501, raw("BREW", "/", body=GET)),
    (401, raw("POST", "/api/events", body=GET)),
    (403, raw("POST", "/api/events", user=2, body=GET)),
    (404, raw("POST", "/x", body=GET)),
    (405, raw("PATCH", "/", body=GET)),
    (413, raw("GET", "/", body=b" " * 65537)),
    (414, of_size(8193, 99)),
    (431, of_size(99, 16385)),
]


@each("status, first", KEEPS_OPEN, ids=short)
def test_a_response_keeps_the_connection_if_no_body_is_unread(
    shared_server, status, first
):
    """The advertised timeout is one second less than the server's."""
    replies = shared_server.talk(first + GET + GET)
    assert statuses(replies) == [status, 200, 200]
    for reply in replies:
        assert reply.headers["keep-alive"] == "timeout=15"
        assert "connection" not in reply.headers


@each("status, last", CLOSES, ids=short)
def test_a_response_that_closes_the_connection_says_so(shared_server, status, last):
    """A body that was not read is never parsed as a request."""
    (reply,) = shared_server.talk(last + GET, half_close=False)
    assert (reply.status, reply.headers["connection"]) == (status, "close")
    assert "keep-alive" not in reply.headers


EXPECT = "Expect: 100-Continue", f"Content-Length: {len(BODY)}"
CREATE_HEAD = raw("POST", "/api/events", *EXPECT, user=1)
REJECTED = [
    (404, raw("POST", "/x", *EXPECT)),
    (401, raw("POST", "/api/events", *EXPECT)),
    (403, raw("POST", "/api/events", *EXPECT, user=2)),
    (413, raw("POST", "/api/events", EXPECT[0], "Content-Length: 65537", user=1)),
]


def test_an_http_1_1_client_that_expects_100_gets_it(server):
    replies = server.talk(CREATE_HEAD, BODY + CREATE_HEAD, BODY)
    assert statuses(replies) == [100, 201] * 2
    replies = server.talk(CREATE_HEAD.replace(b"1.1", b"1.0", 1), BODY)
    assert statuses(replies) == [201]


@each("status, head", REJECTED)
def test_a_rejected_client_is_not_told_to_continue(shared_server, status, head):
    assert statuses(shared_server.talk(head, half_close=False)) == [status]


def test_control_characters_of_a_client_are_escaped(shared_server):
    name = '"\r\nSet-Cookie: x\x1b<script>'
    body = json.dumps({name: 1}).encode()
    (reply,) = shared_server.talk(raw("PUT", "/api/events/1", user=1, body=body))
    assert (reply.status, "set-cookie" in reply.headers) == (400, False)
    assert not re.search(b"[\r\x1b]|\n.", reply.raw)


def test_empty_lines_after_the_last_request_get_no_response(shared_server):
    for data in b"\r\n", GET + b"\r\n", GET + GET + b"\r\n":
        assert statuses(shared_server.talk(data)) == [200] * data.count(b"GET")


LONG = [  # headers, targets and bodies of about 16, 8 and 64 KiB
    *[raw("GET", "/", f"{name}: x{' ' * 16_000}x") for name in ("Connection", "X")],
    *[
        raw("GET", "/", f"Connection: {',' * 16_000}"),
        raw("GET", "/" + "9" * 8000),
    ],
    *[
        raw("GET", "/", *["a:"] * 4000),
        raw("GET", "http://" + "a" * 8000 + "@/"),
    ],
    raw("PUT", "/api/events/1", f"If-Match: x{' ' * 16_000}x", user=1),
    *[raw("GET", f"/api/events?{text}", user=2) for text in ("&" * 8000, "%" * 8000)],
    *[raw("GET", f"/api/events?offset={'9' * 8000}", user=2)],
    *[raw("POST", "/api/events", user=1, body=b'{"x":' + b" " * 65_000 + b"!")],
    *[raw("POST", "/api/events", user=1, body=b"[" + b"9" * 65_000 + b"]")],
    *[raw("POST", "/api/events", user=1, body=b'"' + b"\\u0000" * 10_000)],
]


@each("long", LONG, ids=short)
def test_the_cost_of_parsing_is_proportional_to_the_size(shared_server, long):
    """A quadratic parser takes 0.2 s of processor time; the fastest of three counts."""
    durations = []
    for _ in "123":
        begin = time.process_time()
        assert len(shared_server.talk(long)) == 1
        durations.append(time.process_time() - begin)
    assert min(durations) < 0.1


# ---- Connections -------------------------------------------------------------


@each("status, data", [(201, CREATE), (200, LIST), (400, raw("GET", "/", "X : 1"))])
def test_a_request_can_arrive_in_two_pieces(server, status, data):
    for at in range(1, len(data)):
        assert statuses(server.talk(data[:at], data[at:])) == [status], at


def test_an_incomplete_request_is_never_performed(server):
    assert server.talk(b"") == server.talk(b"\r\n") == []
    for data in CREATE, BOOK:
        for at in range(1, len(data)):
            assert statuses(server.talk(data[:at])) == [400], at
    assert server.list().body == [{"id": 1, **EVENT}]


def test_pipelined_requests_are_answered_in_order(server):
    reads = [raw("GET", f"/api/events/{id}", user=2) for id in range(2, 52)]
    replies = server.talk(CREATE * 50 + b"".join(reads))
    assert statuses(replies) == [201] * 50 + [200] * 50
    assert [reply.body["id"] for reply in replies] == [*range(2, 52)] * 2


def make_a_long_list(server):
    """Create so many events that 30 lists of them do not fit into socket buffers."""
    body = json.dumps({**EVENT, "title": "\x01" * 200}).encode()
    server.repeat(raw("POST", "/api/events", user=1, body=body), 300)


@contextlib.contextmanager
def client_that_does_not_read(server, data=LIST * 30):
    """Connect a client whose responses have 11 MB, and which reads none of them."""
    with server.connect() as connection:
        connection.sendall(data)
        connection.recv(1, socket.MSG_PEEK)
        yield connection


def reset(connection):
    """Disconnect with a TCP reset instead of a FIN."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


STATES = [b"", CREATE[:20], CREATE[:-9], LIST, LIST * 30, b"\0\n", b"\0\n" * 50_000]


@with_server(connection_limit=3, idle_timeout=60)
@each("data", STATES, ids=short)
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


@with_server(client_timeout=0.2)
def test_a_client_that_reads_nothing_is_dropped(server):
    make_a_long_list(server)
    with client_that_does_not_read(server) as connection:
        assert server.list().status == 200
        eventually(lambda: is_disconnected(connection))


def is_disconnected(connection):
    """Tell whether the other side has closed a connection, by sending an empty line."""
    try:
        connection.sendall(b"\r\n")
    except OSError:
        return True


@with_server(client_timeout=0.2)
@each("data", [CREATE, b"\0\n"], ids=["request", "rejected"])
def test_a_client_that_sends_slowly_is_dropped(server, data):
    """The timeout is for the whole request, not for each byte of it."""
    deadline = time.monotonic() + 3
    with server.connect() as connection, pytest.raises(OSError):
        connection.settimeout(0.01)
        for byte in itertools.cycle(data):
            assert time.monotonic() < deadline
            connection.sendall(bytes([byte]))
            with contextlib.suppress(socket.timeout):
                connection.recv(99_999)
    assert server.list().body == [{"id": 1, **EVENT}]


@with_server(client_timeout=0.15)
@each("data, expected", [(b"", []), (CREATE[:-1], []), (GET, [200])])
def test_an_idle_client_is_dropped_after_the_timeout(server, data, expected):
    begin = time.monotonic()
    with server.connect() as connection:
        connection.sendall(data)
        assert statuses(read_to_end(connection)) == expected
        assert 0.1 < time.monotonic() - begin < 5


def test_a_slow_operation_does_not_count_as_idle():
    store, never_set = eventbook.Store(), threading.Event()
    store.on("event.updated", lambda *_: never_set.wait(0.4))
    limits = {"client_timeout": 0.2, "connection_limit": 1, "idle_timeout": 0.1}
    with serving(store, **limits) as server, ThreadPoolExecutor(1) as pool:
        with server.connect() as connection:
            connection.sendall(raw("PUT", "/api/events/1", user=1))
            newcomer = pool.submit(server.settle)
            assert statuses(read_to_end(connection)) == [200]
        newcomer.result()


@with_server(connection_limit=8, idle_timeout=60)
def test_every_client_of_a_crowd_is_served(server):
    """Of 24 clients each books ten tickets, on a new connection if it was closed."""
    server.update(availableTickets=1000)

    def client(_):
        connection, booked = server.connect(), []
        for _ in range(10):
            reply = exchange(connection, BOOK)
            booked.append(reply.body["booking"])
            if reply.headers.get("connection") == "close":
                connection.close()
                connection = server.connect()
        connection.close()
        return booked

    booked = list(itertools.chain(*together(24, client)))
    logged = [booking for _, booking in server.logged()]
    assert len(booked) == 240
    assert sorted(booked, key=str) == sorted(logged, key=str)


@with_server(connection_limit=8, idle_timeout=0.05)
def test_a_client_that_was_dropped_has_booked_nothing(server):
    """Each client is idle for about as long as a full server allows."""
    server.update(availableTickets=10_000)
    deadline = time.monotonic() + 1

    def client(number):
        chance, booked = random.Random(number), 0
        while time.monotonic() < deadline:
            errors = OSError, http.client.HTTPException
            with contextlib.suppress(*errors), server.connect() as connection:
                time.sleep(chance.uniform(0.048, 0.058))
                booked += exchange(connection, BOOK).status == 201
        return booked

    assert sum(together(16, client)) == len(server.logged()) > 0


@with_server(connection_limit=3, idle_timeout=0.1)
def test_the_client_that_is_idle_longest_makes_room(server):
    """The first client made the latest request, so the second client is dropped."""
    with server.connect() as first, server.connect() as second:
        for connection in first, second, first:
            assert exchange(connection, GET).status == 200
        with server.connect() as third, server.connect() as fourth:
            assert exchange(fourth, GET).status == 200
            assert second.recv(1) == b""
            assert statuses([exchange(first, GET), exchange(third, GET)]) == [200, 200]


@with_server(connection_limit=2, idle_timeout=0.1)
def test_slow_clients_do_not_keep_others_out(server):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.connect()).sendall(CREATE[:20])
        for _ in range(3):
            server.settle()


@with_server(connection_limit=1, idle_timeout=9)
def test_a_full_server_closes_after_each_response(server):
    with server.connect() as connection:
        connection.sendall(GET)
        (reply,) = read_to_end(connection)
    assert reply.headers["connection"] == "close"
    assert server.list().status == 200


@linux
def test_without_more_threads_only_newcomers_are_disconnected(server):
    """No thread can start with a stack that is larger than the address space."""
    with server.connect() as client:
        assert exchange(client, GET).status == 200
        threading.stack_size(2**50)
        try:  # One thread may be free, so that it serves the first newcomer.
            with server.connect(), server.connect() as newcomer:
                assert newcomer.recv(1) == b""
            assert exchange(client, GET).status == 200
        finally:
            threading.stack_size(0)
    assert server.book().status == 201


@each("data", [raw("GET", "/", "X : 1"), raw("BREW", "/"), b"\n"], ids=short)
def test_an_error_can_be_read_by_a_client_that_still_sends(server, data):
    """Closing with unread input would reset the connection and lose the error."""
    (reply,) = server.talk(data, *[b"x" * 99_999] * 9)
    assert reply.status in (400, 501)


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
    for _ in "12":
        with serving_all(tmp_path) as server:
            assert server.book().body["booking"]["id"] == 1
    *kept, first, second, rest = server.log.read_bytes().split(b"\n")
    assert (kept, rest) == (content.splitlines(), b"")
    assert json.loads(first)["data"] == json.loads(second)["data"]


CHANGES_OF_THE_LOG = {  # and how many lines come before those of two more bookings
    "renamed": (lambda log: log.rename(f"{log}.1"), 0),
    "removed": (os.remove, 0),
    "truncated": (lambda log: os.truncate(log, 0), 0),
    "truncated within a line": (
        lambda log: os.truncate(log, log.stat().st_size - 5),
        1,
    ),
    "appended to": (lambda log: log.write_bytes(log.read_bytes() + b"x"), 2),
}


@each("change, lines", CHANGES_OF_THE_LOG.values(), ids=CHANGES_OF_THE_LOG)
def test_logging_survives_changes_of_the_file(server, change, lines):
    server.book()
    change(server.log)
    assert statuses([server.book(), server.book()]) == [201, 201]
    *left, second, third, rest = server.log.read_bytes().split(b"\n")
    assert [json.loads(line)["data"]["id"] for line in (second, third)] == [2, 3]
    assert (len(left), rest) == (lines, b"")


def test_without_the_log_nothing_is_booked_and_stderr_says_why(server):
    """Each outage is reported once. The failed booking does not use up its key."""
    for number in 1, 2:
        os.remove(server.log)
        os.mkdir(server.log)
        for _ in "123":
            reply = server.book(key=f"{number}")
            assert reply[:2] == (503, {"error": "The log cannot be written"})
            assert int(reply.headers["retry-after"]) > 0
        assert len(server.bookings_of_event().body) == number - 1
        os.rmdir(server.log)
        assert server.book(key=f"{number}").status == 201
    assert len(server.printed()) == 2
    problems = server.problems()
    assert len(problems) == 2
    for line in problems:
        assert re.fullmatch("eventbook: cannot write the log: .*log.*", line)


def test_without_the_log_nothing_is_cancelled(server):
    server.book()
    os.remove(server.log)
    os.mkdir(server.log)
    assert server.cancel().status == 503
    os.rmdir(server.log)
    assert server.cancel().status == 200


FAILING = [
    ("booking.created", Client.book),
    ("booking.cancelled", Client.cancel),
    ("event.updated", Client.update),
]


@each("name, change", FAILING)
def test_an_observer_that_raises_prevents_the_change(capsys, name, change):
    """The client gets a 500, stderr the traceback; later observers are not called."""
    failing, called, store = [True], [], eventbook.Store()
    with serving(store) as server:
        server.book()
        store.on(name, lambda *_: failing and 1 / 0)
        store.on(name, lambda *_: called.append(name))
        before = server.read()[:2], server.bookings_of_event().body
        assert change(server)[:2] == (500, {"error": "Internal server error"})
        assert (server.read()[:2], server.bookings_of_event().body) == before
        assert (called, capsys.readouterr().err.count("ZeroDivisionError")) == ([], 1)
        failing.clear()
        assert (change(server).status < 300, called) == (True, [name])


def test_a_bug_is_reported_although_its_client_has_disconnected(capsys):
    store = eventbook.Store()
    started, disconnected = threading.Event(), threading.Event()
    store.on("event.updated", lambda *_: started.set())
    store.on("event.updated", lambda *_: disconnected.wait(20) and 1 / 0)
    with serving(store) as server:
        connection = server.connect()
        connection.sendall(raw("PUT", "/api/events/1", user=1))
        started.wait(20)
        reset(connection)
        disconnected.set()
        (reply,) = server.talk(raw("PUT", "/api/events/1", user=1) + GET)
        assert (reply.status, reply.headers["connection"]) == (500, "close")
    assert capsys.readouterr().err.count("ZeroDivisionError") == 2


def test_a_bug_is_a_500_although_stderr_is_closed(tmp_path):
    store = eventbook.Store()
    store.on("event.updated", lambda *_: 1 / 0)
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        stderr.close()
        with serving(store) as server, contextlib.redirect_stderr(stderr):
            assert server.update().status == 500


@each("console", ["none", "closed", "without emoji"])
def test_the_console_never_affects_a_request(tmp_path, console):
    with open(tmp_path / "stdout", "w", encoding="ascii") as stream:
        printer = eventbook.Printer(None if console == "none" else stream)
        if console == "closed":
            stream.close()
        printer.start()
        store = eventbook.open_store(str(tmp_path / "log"), printer, printer)
        with serving(store) as server:
            assert server.book().status == 201
        printer.close(5)
        assert not printer.is_alive()
    printed = "? Booking confirmation email sent for booking 1\n"
    printed = printed if console == "without emoji" else ""
    assert (tmp_path / "stdout").read_text("ascii") == printed


# ---- Stopping ----------------------------------------------------------------

PROGRAM = os.path.join(HERE, "eventbook.py")
ENVIRONMENT = {**os.environ, "PORT": "", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def launch(tmp_path):
    """launch(*options) starts the program; at the end it is killed if it still runs."""
    with contextlib.ExitStack() as stack:

        def start(*options, program=PROGRAM, shell=(), flags=()):
            """Return a Client, whose `process` is the program."""
            command = [*shell, sys.executable, *flags, program, "-p", "0", *options]
            pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
            pipes["encoding"] = "utf-8"
            process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **pipes)
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
        with serving(eventbook.Store(), shutdown_timeout=30) as server:
            clients = [stack.enter_context(server.connect()) for _ in range(16)]
            assert all(exchange(client, GET).status == 200 for client in clients)
            for client in clients[1:]:
                client.sendall(GET * 3)
            begin = time.monotonic()
        assert time.monotonic() - begin < 10
        assert clients[0].recv(1) == b""
        for client in clients[1:]:
            assert statuses(read_to_end(client)) == [200] * 3


def test_no_client_can_delay_the_stop(tmp_path):
    """Some send nothing, some half a request, and some do not read."""
    with contextlib.ExitStack() as stack:
        with serving_all(tmp_path, shutdown_timeout=0.2) as server:
            make_a_long_list(server)
            for data in [b"", CREATE[:-2], LIST * 30] * 3:
                stack.enter_context(server.connect()).sendall(data)
            server.settle()
            begin = time.monotonic()
        assert time.monotonic() - begin < 2


@posix
@each(
    "name, flags",
    [("SIGTERM", ["-X", "dev", "-W", "error"]), ("SIGINT", []), ("SIGHUP", [])],
)
def test_a_signal_stops_the_program(launch, name, flags):
    """It accepts no more clients, sends what they wait for, prints what is queued, and
    leaves nothing open that Python would warn of."""
    if name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored here, as under nohup")
    program = launch("--log", "log", flags=flags)
    program.create()
    make_a_long_list(program)
    late_reader = client_that_does_not_read(program, LIST * 30 + BOOK)
    with program.connect() as idle, late_reader as late:
        program.settle()
        program.process.send_signal(getattr(signal, name))
        assert read_to_end(idle) == []
        with pytest.raises(OSError):
            program.connect()
        assert statuses(read_to_end(late)) == [200] * 30 + [201]
    printed = "📧 Booking confirmation email sent for booking 1\n"
    assert outcome(program.process) == (0, printed, "")


@posix
@each("reader", [True, False])
def test_the_stop_waits_for_a_reader_of_the_output_but_not_long(program, reader):
    """The pipe of stdout is full. Meanwhile a client tries to connect every 7 ms."""
    program.create(availableTickets=2500)
    program.repeat(BOOK, 2500)
    begin, accepted = time.monotonic(), 0
    program.process.terminate()
    printed = program.process.stdout.read() if reader else ""
    while program.process.poll() is None:
        with contextlib.suppress(OSError), program.connect():
            accepted = time.monotonic() - begin
        time.sleep(0.007)
    assert (program.process.returncode, program.process.stderr.read()) == (0, "")
    assert printed.count("📧") == (2500 if reader else 0)
    assert accepted < 1 and time.monotonic() - begin < 4


@posix
def test_sighup_stays_ignored_under_nohup(launch):
    nohup = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    program = launch("--log", "log", shell=nohup)
    program.process.send_signal(signal.SIGHUP)
    for _ in range(100):  # longer than a stop takes
        program.settle()
    program.process.terminate()
    program.process.terminate()  # A second SIGTERM changes nothing.
    assert outcome(program.process) == (0, "", "")


@posix
def test_a_second_ctrl_c_ends_the_program_at_once(program):
    make_a_long_list(program)
    with client_that_does_not_read(program), program.connect() as idle:
        program.settle()
        program.process.send_signal(signal.SIGINT)
        assert read_to_end(idle) == []
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(20) == -signal.SIGINT


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
    assert [program.book().status for _ in "12"] == [201, 201]
    content, unlimited = program.log.read_bytes(), resource.RLIM_INFINITY
    for limit, status in (len(content) + 40, 503), (unlimited, 201):
        limits = resource.RLIMIT_FSIZE, (limit, unlimited)
        resource.prlimit(program.process.pid, *limits)
        assert program.book().status == status
        assert program.cancel().status == (503 if status == 503 else 200)
        assert program.log.read_bytes().startswith(content)
        assert (program.log.read_bytes() == content) == (status == 503)
    assert [booking["id"] for _, booking in program.logged()] == [1, 2, 3, 1]


@posix
def test_small_stacks_are_enough_for_nested_json(launch):
    """Python 3.13 would crash on a thread with 1 MiB, which is the default here."""
    program = launch(
        "--log", "log", shell=("sh", "-c", 'ulimit -s 1024; exec "$@"', "sh")
    )
    for body in b"[" * 7000, b"[" * 65_536:
        assert program.call("PUT", "/api/events/1", 1, body).status == 400
    program.process.terminate()
    assert outcome(program.process) == (0, "", "")


@posix
def test_few_file_descriptors_are_enough(launch):
    """Idle clients take all but a reserve, so that bookings can still be logged."""
    program = launch(
        "--log", "log", shell=("sh", "-c", 'ulimit -n 56; exec "$@"', "sh")
    )
    program.create(availableTickets=500)
    with contextlib.ExitStack() as stack:
        client, *_ = [stack.enter_context(program.connect()) for _ in range(60)]
        client.sendall(BOOK * 400)
        client.shutdown(socket.SHUT_WR)
        assert set(statuses(read_to_end(client))) == {201}
    program.process.terminate()
    assert outcome(program.process)[::2] == (0, "")


# ---- Command line ------------------------------------------------------------

PORTS = [  # arguments, PORT, the port
    ([], None, 3000),
    ([], "", 3000),
    ([], "4000", 4000),
    (["--port", "5000"], "4000", 5000),
    (["-p", "0"], "x", 0),
]


@each("arguments, variable, port", PORTS)
def test_the_port_option_overrides_the_variable(monkeypatch, arguments, variable, port):
    if variable is None:
        monkeypatch.delenv("PORT", raising=False)
    else:
        monkeypatch.setenv("PORT", variable)
    assert eventbook.parse_options(arguments).port == port


def test_port_is_used_and_free_again_at_once(launch):
    """The server closes first, so that the connection stays in TIME_WAIT."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in "12":
        program = launch("--log", "log", "--port", str(port))
        assert program.port == port
        program.talk(GET.replace(b"1.1", b"1.0"), half_close=False)
        program.process.terminate()
        assert outcome(program.process) == (0, "", "")


HOSTS_SHOWN = [("127.0.0.1", "localhost"), ("", "localhost"), ("::1", "[::1]")]


def has_ipv6():
    address = {"address": ("::1", 0), "family": socket.AF_INET6}
    with contextlib.suppress(OSError), socket.create_server(**address):
        return True


@each("host, shown", HOSTS_SHOWN)
def test_the_start_line_has_the_real_url(launch, host, shown):
    if host == "::1" and not has_ipv6():
        pytest.skip("IPv6 is not available")
    program = launch("--host", host, "--log", "log")
    url = re.fullmatch(r"eventbook is listening on (http://(\S*):\d+)\n", program.line)
    assert (url[2], opener.open(url[1], timeout=5).status) == (shown, 200)
    with contextlib.suppress(OSError):
        assert not opener.open(f"http://127.0.0.2:{program.port}", timeout=5)


INVALID_OPTIONS = [  # arguments, PORT, the end of the last line on stderr
    (["--no-such-option"], "", "unrecognized arguments: --no-such-option"),
    (["-p"], "", "argument -p/--port: expected one argument"),
    (["-p", "x"], "", "argument -p/--port: invalid int value: 'x'"),
    ([], "x", "argument -p/--port: invalid int value: 'x'"),
]


@each("arguments, variable, error", INVALID_OPTIONS)
def test_invalid_options_exit_2_with_usage(
    capsys, monkeypatch, arguments, variable, error
):
    monkeypatch.setenv("PORT", variable)
    monkeypatch.setenv("PYTHON_COLORS", "0")
    with pytest.raises(SystemExit) as exit:
        eventbook.main(arguments)
    *usage, line = capsys.readouterr().err.splitlines()
    assert (exit.value.code, bool(usage)) == (2, True)
    assert line.endswith(error)


FAILED_STARTS = [  # arguments, the beginning of the message, and its end
    (["--log", "."], "eventbook: cannot write . (", "); change --log"),
    (["--log", "no/log"], "eventbook: cannot write no/log (", "); change --log"),
    (["-p", "{port}"], "eventbook: cannot listen on 127.0.0.1:{port} (", "--host"),
    (["-p", "65536"], "eventbook: cannot listen on 127.0.0.1:65536 (", "--host"),
    (["-p", "-1"], "eventbook: cannot listen on 127.0.0.1:-1 (", "--host"),
    (["--host", "no.invalid"], "eventbook: cannot listen on no.invalid:", "--host"),
    (["--host", "a..b"], "eventbook: cannot listen on a..b:", "--host"),
    (["--host", "é" * 64], "eventbook: cannot listen on éééé", "--host"),
]


@each("arguments, begin, end", FAILED_STARTS)
def test_a_failed_start_says_what_to_change(
    shared_server, monkeypatch, tmp_path, arguments, begin, end
):
    """The program exits with status 1 and this one line."""
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(port=shared_server.port) for text in arguments]
    with pytest.raises(SystemExit) as exit:
        eventbook.main(["-p", "0", "--log", "log", *arguments])
    message = str(exit.value.code)
    assert message.startswith(begin.format(port=shared_server.port))
    assert message.endswith(end) and "\n" not in message


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
    assert "\n\neventbook: an event booking backend over HTTP\n\n" in text
    port = "port to listen on, 0 for any free port (default: $PORT, or else 3000)"
    log = os.path.join(HERE, "logs", "events.log.jsonl")
    options = f" {port} --host HOST default: 127.0.0.1 --log FILE default: {log} --ver"
    assert options in " ".join(text.split())
    users = "".join(
        f"  user-id: {id}  {role}\n" for id, role in eventbook.USERS.items()
    )
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    assert text.endswith(f"\n\nusers:\n{users}\nexample:\n{example}\n")


def test_version_prints_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        eventbook.main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, "eventbook 1.0.0\n")


def test_the_default_log_is_beside_the_program(launch, tmp_path):
    """Here the program is a copy without a logs folder, started from another folder."""
    (tmp_path / "home").mkdir()
    copy = shutil.copy(PROGRAM, tmp_path / "home")
    for lines in 1, 2:
        program = launch(program=copy)
        program.log = tmp_path / "home" / "logs" / "events.log.jsonl"
        assert [program.create().status, program.book().status] == [201, 201]
        assert len(program.logged()) == lines


@linux
def test_the_program_is_pinned_to_one_cpu_by_its_process_id(program):
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("a free-threaded Python uses all CPUs")
    cpus = sorted(os.sched_getaffinity(0))
    pinned = os.sched_getaffinity(program.process.pid)
    assert pinned == {cpus[program.process.pid % len(cpus)]}


# ---- README ------------------------------------------------------------------


def readme(pattern):
    """Return all that a pattern matches in the README."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return re.findall(pattern, file.read(), re.MULTILINE)


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


def test_the_routes_in_the_readme_are_those_of_the_code():
    rows = readme(r"^\| `([A-Z]+) (\S+)` \| (.*) \| (.*) \|$")
    assert len(rows) == len(eventbook.ROUTES)
    for (method, path, roles, description), route in zip(rows, eventbook.ROUTES):
        assert (method, path) == (route.method, route.path)
        assert roles == (", ".join(route.roles) or "anyone")
        assert description == route.operation.__doc__


def test_the_limits_in_the_readme_are_those_of_the_code():
    limits = {
        "8 KiB": eventbook.REQUEST_LINE_LIMIT == 8192,
        "16 KiB": eventbook.HEADERS_LIMIT == 16384,
        "64 KiB": eventbook.BODY_LIMIT == 65536,
        "16 s": eventbook.Server.client_timeout == 16,
        "2 s": eventbook.Server.shutdown_timeout == 2,
        "at least a second": eventbook.Server.idle_timeout == 1,
        "512": eventbook.Server.connection_limit == 512,
    }
    for text, is_true in limits.items():
        assert is_true and readme(rf"\b{text}\b"), text
