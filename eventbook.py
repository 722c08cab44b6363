"""eventbook: an event booking backend over HTTP, in one file, standard library only.

    python eventbook.py                    # http://localhost:3000; Ctrl-C stops it
    curl -H 'user-id: 2' http://localhost:3000/api/events

Organizers create and update events, customers list them, book tickets and cancel.

    event      Event(1, "Tech Conference 2026", "2026-02-15", 3, etag='"5f0c-1"')
    booking    Booking(1, 1, 2): booking 1 is one ticket of event 1 for customer 2
    operation  Store.book(store, request): what a route does
    refusal    Refusal(404, "Event not found"): what "refuses (404)" says may be raised
    inbox      b"GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n": what has arrived of requests

1. State changes only inside Store, under its lock, and only if no observer objects: a
   booking's line is in the log before the booking exists.
2. Above the routes nothing knows a socket; between them and the command line nothing
   knows a booking. They make a Request of a Head, and an Answer of a record.
3. One thread, in Server, serves all clients; what waits for a client is a generator, in
   Handler. Only the printing of notifications has a thread of its own.
"""

import argparse
import contextlib
import email.utils
import functools
import json
import os
import queue
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections import OrderedDict, defaultdict, namedtuple
from datetime import date, datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

VERSION = "1.0.0"
DEFAULT_LOG = os.path.abspath(os.path.join(__file__, "../logs/events.log.jsonl"))

# ---- Records and rules -------------------------------------------------------
# The nouns, and what is valid. A record never changes: another takes its place.

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
USERS = {"1": ORGANIZER, "2": CUSTOMER, "3": CUSTOMER}  # user-id -> role

Event = namedtuple("Event", "id title date availableTickets etag")
Booking = namedtuple("Booking", "id eventId customerId")
Answer = namedtuple("Answer", "status content fields", defaults=({},))


class Refusal(Exception):
    """Raised where a request cannot be granted; holds the Answer that says why."""

    def __init__(self, status, error, fields=None, **more):
        self.answer = Answer(status, {"error": error, **more}, fields or {})


TIME = r"([01]\d|2[0-3]):[0-5]\d"
DATE = re.compile(rf"\d{{4}}-\d\d-\d\d(T{TIME}(:[0-5]\d)?(Z|[+-]{TIME})?)?", re.ASCII)


def is_title(value):
    return isinstance(value, str) and len(value) <= 200 and bool(value.strip())


def is_date(value):
    with contextlib.suppress(TypeError, ValueError):  # no text; no such day
        # The pattern first: what else fromisoformat() takes depends on the Python.
        return DATE.fullmatch(value) and date.fromisoformat(value[:10])


def integer(least, most):
    """A rule for whole numbers; True, 3.0 and "3" are none."""
    words = f"an integer from {least:,} to {most:,}"
    return (lambda value: type(value) is int and least <= value <= most), words


# Rules by name: a test, and the words for what would pass it.
CREATE = {
    "title": (is_title, "text of 1 to 200 characters, not blank"),
    "date": (is_date, "a real date, like 2026-02-15 or 2026-02-15T19:30"),
    "availableTickets": integer(1, 10**9),
}
UPDATE = {**CREATE, "availableTickets": integer(0, 10**9)}  # 0: none for sale
PAGE = {
    "limit": integer(1, 1000),
    "offset": (lambda value: type(value) is int, "an integer from 0 up"),
}
FLAG = (lambda value: value in ("true", "false"), "true or false")
EVENT_PAGE = {**PAGE, "available": FLAG}
IS_KEY = re.compile("[!-~]{1,255}").fullmatch
KEY = {"Idempotency-Key": (IS_KEY, "1 to 255 visible characters")}
UNKNOWN = (lambda value: False, "no field of this name is known")


def check(values, rules):
    """Refuse (400) values that fail their rules, or for which there is no rule."""
    wrong = {}
    for name, value in values.items():
        passes, words = rules.get(name, UNKNOWN)
        if not passes(value):
            wrong[name] = words
    if wrong:
        raise Refusal(400, "Validation failed", details=wrong)


# ---- Requests and answers ----------------------------------------------------
# What an operation is given, and how what it returns is shown.


class Request(namedtuple("Request", "path query fields content id user")):
    """What an operation is given; id is the one in the path, user the user's number."""

    def json(self):
        """The content as a dict, empty if there is none; refuses (400)."""
        try:
            value = json.loads(self.content.decode() or "{}")
            encode(value)  # refuses NaN, 1e400 and lone surrogates at any depth
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"Invalid JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refusal(400, "Invalid JSON: an object is wanted")
        return value


ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(content):
    """A line of JSON in UTF-8; raises ValueError or RecursionError if there is none."""
    return ENCODER.encode(content).encode() + b"\n"


def elements(field):
    """The elements of a field that is a list: RFC 9110, section 5.6.1."""
    return re.split("[ \t]*,[ \t]*", field)


def visible(record):
    """What the JSON of a record shows: all but the ETag, which is a header field."""
    return {name: value for name, value in record._asdict().items() if name != "etag"}


NUMBER = re.compile("[0-9]{1,4000}")  # int() takes no more than 4,300 digits


def page(query, rules, records):
    """The Answer with the part of a list that a query wants, encoded; refuses (400)."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    wanted = {k: int(v) if NUMBER.fullmatch(v) else v for k, v in pairs if k in rules}
    check(wanted, rules)
    if wanted.get("available") == "true":
        records = [event for event in records if event.availableTickets]
    part = records[wanted.get("offset", 0) :][: wanted.get("limit")]
    content = encode([visible(record) for record in part])
    return Answer(200, content, {"X-Total-Count": len(records)})


# ---- Observers ---------------------------------------------------------------
# Who must know of a booking, a cancelling or an update hears of it before it happens.
# What an observer raises prevents it; so those that may raise come first.


class Observable:
    """Tells observers what is about to happen."""

    def __init__(self):
        self.observers = defaultdict(list)

    def on(self, name, *observers):
        """Call them, as observer(name, data), at each emit(name, data)."""
        self.observers[name] += observers

    def emit(self, name, data):
        for observer in self.observers[name]:
            observer(name, data)


LINE = '{"event":"%s","timestamp":"%s","data":{"id":%d,"eventId":%d,"customerId":%d}}\n'


class Log:
    """A JSON Lines file: an appended line survives kill -9, though no power cut."""

    def __init__(self, path):
        """Open or create it, and end the half line of a crash; raises OSError."""
        self.file = open(path, "a+b", buffering=0)
        if os.path.getsize(path):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read() != b"\n":
                self.file.write(b"\n")

    def __call__(self, name, booking):
        """Append a line, or take back what was written of it and refuse (503)."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = (LINE % (name, now.replace("+00:00", "Z"), *booking)).encode()
        with contextlib.suppress(OSError):
            written = self.file.write(line)
            if written == len(line):
                return
            self.file.truncate(self.file.tell() - written)
        error = "The log cannot be written; nothing was changed, try again later"
        raise Refusal(503, error, {"Retry-After": "5"})


class Notifier(threading.Thread):
    """Prints lines from its own thread, in order; survives a console that fails."""

    def __init__(self, write):
        """write(text) prints; it may raise OSError or ValueError."""
        super().__init__(daemon=True)
        self.write, self.lines = write, queue.SimpleQueue()

    def confirm(self, _, booking):
        self.say(f"📧 Booking confirmation email sent for booking {booking.id}")

    def announce(self, _, customers):
        for customer in customers:
            self.say(f"🔔 Event update notification sent to customer {customer}")

    def say(self, line):
        """Have a line printed; never waits, never fails."""
        self.lines.put(line + "\n")

    def run(self):
        batch = []
        while "" not in batch:
            batch = [self.lines.get()]
            time.sleep(0.01)  # waking up for every line would slow bookings down
            batch += [self.lines.get() for _ in range(self.lines.qsize())]
            with contextlib.suppress(OSError, ValueError):
                self.write("".join(batch))

    def close(self, timeout):
        """Wait until nothing is left to print, or for so many seconds."""
        self.lines.put("")
        self.join(timeout)


# ---- Store -------------------------------------------------------------------
# Everything there is, in dicts, and the operations: a Request in, a record or an Answer
# out. Their docstrings are what GET / tells of them.


class Store(Observable):
    """Events and bookings, in memory, for any number of threads (the server is one)."""

    def __init__(self):
        super().__init__()
        # The law of the lock: what reads or changes the dicts is one `with`, check and
        # change together. Observers run under it, so log lines are in order of changes.
        self.lock = threading.RLock()  # reentrant: operations use one another
        self.nonce = os.urandom(6).hex()  # of this run; no ETag of another is alike
        self.changes = self.last_booking = 0
        self.events = {}  # event id -> Event
        self.bookings = {}  # booking id -> Booking while it lives, in order of id
        self.by_key = OrderedDict()  # (customer id, key) -> Booking, cancelled or not
        self.listed = {}  # the last query for events -> its Answer, until a change

    def create(self, request):
        """Put an event on sale."""
        given = request.json()
        values = {name: given.get(name) for name in CREATE}
        check(values, CREATE)
        with self.lock:
            return self._put(Event(len(self.events) + 1, **values, etag=None))

    def update(self, request):
        """Change an event; the customers with a live booking are told."""
        values = request.json()
        with self.lock:
            event = self.event(request)
            tags = elements(request.fields.get("if-match", "*"))
            if tags != ["*"] and event.etag not in tags:  # RFC 9110, 13.1.1
                raise Refusal(412, "Event has changed", {"ETag": event.etag})
            check(values, {**UPDATE, "id": integer(event.id, event.id)})
            sold = self._live("eventId", event.id)
            # Also of an update that changes nothing, as assigned in test case 6.
            self.emit("event.updated", dict.fromkeys(each.customerId for each in sold))
            same = event._replace(**values) == event
            return event if same else self._put(event, **values)

    def book(self, request):
        """Book one ticket; with an Idempotency-Key it is safe to ask again."""
        key = request.fields.get("idempotency-key")
        with self.lock:
            event = self.event(request)
            if key is not None:
                check({"Idempotency-Key": key}, KEY)
            first = self.by_key.get((request.user, key))
            if first:
                if first.eventId != event.id:
                    raise Refusal(422, "Idempotency-Key was used for another event")
                return first
            if not event.availableTickets:
                raise Refusal(400, "Booking failed: sold out")
            booking = Booking(self.last_booking + 1, event.id, request.user)
            self.emit("booking.created", booking)
            self.last_booking = booking.id
            self.bookings[booking.id] = booking
            if key:
                self.by_key[request.user, key] = booking
            if len(self.by_key) > 10_000:
                self.by_key.popitem(last=False)
            self._put(event, availableTickets=event.availableTickets - 1)
            return booking

    def cancel(self, request):
        """Cancel a booking of one's own; its ticket is free again."""
        with self.lock:
            booking = self.booking(request)
            self.emit("booking.cancelled", booking)
            del self.bookings[booking.id]
            event = self.events[booking.eventId]
            self._put(event, availableTickets=event.availableTickets + 1)
            return booking

    def event(self, request):
        """Read an event."""
        with self.lock:
            if request.id not in self.events:
                raise Refusal(404, "Event not found")
            return self.events[request.id]

    def booking(self, request):
        """Read a booking of one's own."""
        with self.lock:
            if request.id not in self.bookings:
                raise Refusal(404, "Booking not found")
            if self.bookings[request.id].customerId != request.user:
                raise Refusal(403, "Access denied")
            return self.bookings[request.id]

    def list_events(self, request):
        """List the events; ?available=true leaves out those sold out."""
        with self.lock:
            if request.query not in self.listed:
                answer = page(request.query, EVENT_PAGE, list(self.events.values()))
                self.listed = {request.query: answer}
            return self.listed[request.query]

    def list_bookings(self, request):
        """List an event's live bookings."""
        with self.lock:
            event = self.event(request)
            return page(request.query, PAGE, self._live("eventId", event.id))

    def list_own(self, request):
        """List one's own live bookings."""
        with self.lock:
            return page(request.query, PAGE, self._live("customerId", request.user))

    def _live(self, field, id):
        every = self.bookings.values()
        return [booking for booking in every if getattr(booking, field) == id]

    def _put(self, event, **values):
        self.changes += 1
        self.listed = {}
        etag = f'"{self.nonce}-{self.changes}"'
        self.events[event.id] = event._replace(**values, etag=etag)
        return self.events[event.id]


# ---- Routes ------------------------------------------------------------------
# Which role may do what: said in one table, and checked before any operation runs.
# Whose a booking is, only the store knows.


def describe(_store, _request):
    """Say what this is and what it can do."""
    routes = [
        {"method": method, "path": path, "roles": roles, "does": operation.__doc__}
        for method, path, roles, operation, _ in ROUTES
    ]
    return Answer(200, {"service": "eventbook", "version": VERSION, "routes": routes})


def allow(_store, request):
    """Say which methods a path has."""
    return Answer(204, None, {"Allow": ", ".join(routes_at(request.path))})


Route = namedtuple("Route", "method path roles operation message")
ROUTES = [
    Route("POST", "/api/events", [ORGANIZER], Store.create, None),
    Route("PUT", "/api/events/:id", [ORGANIZER], Store.update, "Event updated"),
    Route("GET", "/api/events", [CUSTOMER], Store.list_events, None),
    Route("POST", "/api/events/:id/book", [CUSTOMER], Store.book, "Booking successful"),
    Route("DELETE", "/api/bookings/:id", [CUSTOMER], Store.cancel, "Booking cancelled"),
    Route("GET", "/api/events/:id", [ORGANIZER, CUSTOMER], Store.event, None),
    Route("GET", "/api/events/:id/bookings", [ORGANIZER], Store.list_bookings, None),
    Route("GET", "/api/bookings", [CUSTOMER], Store.list_own, None),
    Route("GET", "/api/bookings/:id", [CUSTOMER], Store.booking, None),
    Route("GET", "/", [], describe, None),
]
METHODS = "GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split()


def routes_at(path):
    """{method: Route} for a path, or for all of them at "*"; refuses (404)."""
    routes = {}
    for route in ROUTES:
        pattern = route.path.rstrip("/").replace(":id", NUMBER.pattern) + "/?"
        if path == "*" or re.fullmatch(pattern, path):
            routes[route.method] = route
    if not routes:
        raise Refusal(404, "Not found")
    if "GET" in routes:
        routes["HEAD"] = routes["GET"]
    return {**routes, "OPTIONS": Route("OPTIONS", path, [], allow, None)}


@functools.lru_cache  # a client repeats its requests
def admit(method, path, user):
    """(Route, id in the path, user's number); refuses (404, 501, 405, 401, 403)."""
    routes, ids = routes_at(path), NUMBER.findall(path)
    if method not in METHODS:
        raise Refusal(501, "Method not implemented")
    if method not in routes:
        raise Refusal(405, "Method not allowed", {"Allow": ", ".join(routes)})
    route = routes[method]
    if route.roles and user not in USERS:
        raise Refusal(401, "Unauthorized", {"WWW-Authenticate": "user-id"})
    if route.roles and USERS[user] not in route.roles:
        raise Refusal(403, "Access denied")
    return route, (int(ids[0]) if ids else None), (int(user) if route.roles else None)


def perform(store, head, content):
    """The Answer to a request; refuses."""
    route, id, user = admit(head.method, head.path, head.fields.get("user-id"))
    request = Request(head.path, head.query, head.fields, content, id, user)
    result = route.operation(store, request)
    if isinstance(result, Answer):
        return result
    kind, content, fields = type(result).__name__.lower(), visible(result), {}
    if route.method == "POST":
        fields["Location"] = f"/api/{kind}s/{result.id}"
    if kind == "event":
        fields["ETag"] = result.etag
    if route.message:
        content = {"message": route.message, kind: content}
    return Answer(201 if route.method == "POST" else 200, content, fields)


# ---- Reading a request -------------------------------------------------------
# The library's own reader, which hands the header to an e-mail parser, forgives folded
# lines, bare line feeds, two lengths, a missing Host. Such are the ways to make two
# servers differ on where a request ends, or for whom it is (request smuggling). So
# none of them pass here, only an empty line in front is skipped: the whole head must
# match one pattern before anything is done for it. RFC 9112, sections 2 to 7.

LINE_LIMIT = 8 * 1024  # octets of the request line; nginx's default
HEADER_LIMIT = 16 * 1024  # octets of all field lines; Node.js's default
FIELDS_LIMIT = 100  # field lines; Apache's default
CONTENT_LIMIT = 64 * 1024  # octets; an event, all of it escaped, has less than 3,000

# fields: name in lower case -> value; length: of the content, in octets
Head = namedtuple("Head", "method path query fields length persistent expects")

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = f'({TOKEN}) ([!"$-~]+) HTTP/([1-9][.][0-9])\r\n'
FIELD_LINE = f"{TOKEN}:[\t -~\x80-\xff]*\r\n"
WHOLE_HEAD = re.compile(f"{REQUEST_LINE}((?:{FIELD_LINE})*)")
PART_OF_HEAD = re.compile(f"({REQUEST_LINE}({FIELD_LINE})*)?[\t -~\x80-\xff]*\r?")
NAME = "([0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"
AUTHORITY = rf"({NAME}|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\])(:[0-9]{{0,5}})?"
ABSOLUTE_FORM = re.compile(rf"^(?i:https?)://{AUTHORITY}(/|(?=\?|$))")


def read_head(inbox):
    """(Head, begin of content), or twice None if more must arrive; refuses (400, 411,
    413, 414, 431, 505), a malformed line or too much without waiting for the rest."""
    begin = 2 if inbox.startswith(b"\r\n") else 0  # RFC 9112, section 2.2
    end = inbox.find(b"\r\n\r\n", begin)
    if end == -1:
        if not PART_OF_HEAD.fullmatch(checked_for_size(inbox[begin:])):
            raise Refusal(400, "Malformed request")
        return None, None
    return parse_head(inbox[begin : end + 2]), end + 4


def checked_for_size(head):
    """The text of a head, or of what has arrived of one; refuses (414, 431)."""
    text = head.decode("latin-1")
    line, _, header = text.rstrip("\r").partition("\r\n")  # "\r": half a line end
    if len(line) > LINE_LIMIT:
        raise Refusal(414, "Request line too long")
    if len(header) > HEADER_LIMIT or header.count("\r\n") > FIELDS_LIMIT:
        raise Refusal(431, "Header too large")
    return text


@functools.lru_cache  # a kept-alive client repeats its heads
def parse_head(head):
    """The Head that a whole head makes; refuses."""
    match = WHOLE_HEAD.fullmatch(checked_for_size(head))
    if not match:
        raise Refusal(400, "Malformed request line or field line")
    method, target, version, lines = match.groups()
    if version not in ("1.0", "1.1"):
        raise Refusal(505, "HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = {}  # repeated ones joined by ", ", which no Host, length, user or key has
    for line in lines.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return interpret(method, target, version, fields)


def interpret(method, target, version, fields):
    """The Head that a well-formed head means; refuses."""
    host = fields.get("host", "")
    if (host or version == "1.1") and not re.fullmatch(AUTHORITY, host):
        raise Refusal(400, "Exactly one valid Host is needed")
    length = fields.get("content-length", "0")
    if not re.fullmatch("[0-9]+", length):
        raise Refusal(400, "Invalid Content-Length")
    if "transfer-encoding" in fields:
        status = 400 if "content-length" in fields else 411
        raise Refusal(status, "Content-Length is needed, and no Transfer-Encoding")
    path, _, query = ABSOLUTE_FORM.sub("/", target).partition("?")
    if not path.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise Refusal(400, "Invalid request target")
    length = int(length.lstrip("0")[:9] or 0)  # int() takes 4,300 digits; 9 say enough
    if length > CONTENT_LIMIT:
        raise Refusal(413, "Content too large")
    options = elements(fields.get("connection", "").lower())
    persistent = version == "1.1" and "close" not in options
    expects = version == "1.1" and fields.get("expect", "").lower() == "100-continue"
    return Head(method, path, query, fields, length, persistent, expects)


# ---- Connections -------------------------------------------------------------
# A connection is a generator: straight-line code that yields where it has to wait. The
# server's loop resumes it when its socket is ready, and ends it when its time is over
# or its room is needed.

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STANDING = "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
JSON = "Content-Type: application/json; charset=utf-8\r\n"
http_date = functools.lru_cache(email.utils.formatdate)


def octets_of(answer, last, with_content):
    """An Answer as it is sent; all are made here. Bytes count as encoded already."""
    status, content, fields = answer
    head = f"HTTP/1.1 {status} {Handler.responses[status][0]}\r\n{STANDING}"
    head += f"Date: {http_date(int(time.time()), usegmt=True)}\r\n"
    if content is not None:
        content = content if isinstance(content, bytes) else encode(content)
        head += f"{JSON}Content-Length: {len(content)}\r\n"
    if last:
        head += "Connection: close\r\n"
    head += "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return f"{head}\r\n".encode() + (content if with_content and content else b"")


class Handler(BaseHTTPRequestHandler):
    """A connection. It has until its deadline to send a request or take an answer."""

    inbox, close_connection = b"", False
    awaited = EVENT_READ

    def __init__(self, request, client_address, server):
        """Only begin; the base would serve the connection here, from begin to end."""
        self.request, self.client_address, self.server = request, client_address, server
        self.steps = self.converse()

    def converse(self):
        """The connection, until an OSError ends it; yields the event it waits for."""
        self.request.setblocking(False)
        # Nagle's algorithm would hold back the second of two answers for 40 ms.
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.deadline = time.monotonic() + self.server.request_time
        while not self.close_connection:
            octets = self.respond() if self.inbox else b""
            yield from self.send(octets)
            if octets in (b"", CONTINUE):  # no answer yet
                self.inbox += yield from self.receive()
            else:
                self.deadline = time.monotonic() + self.server.request_time
                if self.inbox:
                    yield EVENT_WRITE  # one answer each, then others have their turn
        self.request.shutdown(socket.SHUT_WR)
        self.deadline = time.monotonic() + self.server.linger_time
        while True:  # input that nobody reads would make close() take the answer back
            yield from self.receive()

    def receive(self):
        """What arrives next; raises OSError if nothing has come, or nothing will."""
        yield EVENT_READ
        octets = self.request.recv(64 * 1024)
        if not octets:
            raise ConnectionError  # the client has ended
        return octets

    def send(self, octets):
        octets = memoryview(octets)
        while octets:
            try:
                octets = octets[self.request.send(octets) :]
            except BlockingIOError:
                yield EVENT_WRITE

    def respond(self):
        """What to send next: an answer, 100 Continue, or nothing until more arrives."""
        with_content = not self.inbox.startswith((b"HEAD ", b"\r\nHEAD "))
        persistent = False  # until it is known where the next request begins
        try:
            if self.surplus and not self.server.find_room():
                raise Refusal(503, "All connections are at work", {"Retry-After": "1"})
            self.surplus = False
            head, start = read_head(self.inbox)
            if not head or len(self.inbox) < start + head.length:
                return self.invite(head, start)
            end = start + head.length
            content, self.inbox = self.inbox[start:end], self.inbox[end:]
            persistent = head.persistent
            answer = perform(self.server.store, head, content)
        except Refusal as refusal:
            answer = refusal.answer
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            answer = Answer(500, {"error": "Internal server error"})
        self.deadline = time.monotonic() + self.server.answer_time
        done = self.server.stopping and not self.inbox
        self.close_connection = done or not persistent
        return octets_of(answer, self.close_connection, with_content)

    def invite(self, head, start):
        """100 Continue, once, if the client waits to be asked for content; refuses."""
        if not head or not head.expects or len(self.inbox) > start:
            return b""
        admit(head.method, head.path, head.fields.get("user-id"))
        return CONTINUE


class Server(ThreadingHTTPServer):
    """One loop that serves whoever is ready. Threads, of which the base would start one
    for each connection, spend half their time on handing on the interpreter's lock."""

    allow_reuse_address = os.name == "posix"  # elsewhere two servers would share a port
    allow_reuse_port = False  # and so would they here
    connection_limit = 512 if os.name == "posix" else 400  # select() there takes 512
    request_queue_size = connection_limit
    request_time = answer_time = 15.0  # seconds for all of it, however slowly it comes
    linger_time = 2.0  # seconds for a client to read its last answer and close
    grace_time = 2.0  # seconds for requests that have begun when the server stops
    # To be woken up takes longer than to answer: so it stays awake for what comes next.
    awake_time = 0.0002  # seconds
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's own asks the DNS

    def __init__(self, address, store):
        """Listen; raises OSError, or TypeError for a host that is no name."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.socket.setblocking(False)
        self.store, self.handlers = store, set()
        self.stopping, self.until = False, float("inf")  # nobody is served after that
        self.selector = DefaultSelector()
        self.selector.register(self, EVENT_READ)

    def serve_forever(self, poll_interval=0.5):
        """Serve until shutdown(), then for grace_time those whose request has begun."""
        while not self.stopping:
            self.serve_for(poll_interval)
        self.welcome(self.request_queue_size)
        self.selector.unregister(self)
        self.socket.close()
        while self.handlers and time.monotonic() < self.until:
            self.serve_for(0.05)
        self.selector.close()

    def shutdown(self):
        """Make serve_forever() return before long; does not wait for it."""
        self.stopping, self.until = True, time.monotonic() + self.grace_time

    def serve_for(self, seconds):
        """Serve for so long; then end who is overdue or, if stopping already, idle."""
        looked, stopping, awake = time.monotonic(), self.stopping, 0
        end = looked + seconds
        while looked < end and self.selector.get_map():
            ready = self.selector.select(0 if looked < awake else seconds)
            before, looked = looked, time.monotonic()
            for key, _ in ready:
                if time.monotonic() > self.until:
                    return
                if key.data:
                    self.advance(key.data)
                else:
                    self.welcome()
            if ready:
                awake = time.monotonic() + self.awake_time
        for handler in list(self.handlers):
            idle = handler.awaited == EVENT_READ and not handler.inbox
            # Late at the look before the last: a pause of our own makes nobody overdue.
            if handler.deadline < before or (stopping and idle):
                self.end(handler)

    def welcome(self, most=32):
        """Accept newcomers, but only so many before others are served again."""
        for _ in range(most):
            try:
                request, address = self.get_request()
            except (BlockingIOError, ConnectionError):  # nobody, or not any more
                return
            except OSError:  # out of descriptors, most likely
                if not self.make_room(self.handlers):
                    time.sleep(0.05)
                return
            self.process_request(request, address)

    def process_request(self, request, client_address):
        """Take a connection into the loop; the base would start a thread for it."""
        handler = Handler(request, client_address, self)
        handler.surplus = not self.find_room()  # if still so when it asks: 503
        self.handlers.add(handler)
        self.selector.register(request, EVENT_READ, handler)
        self.advance(handler)

    def find_room(self):
        """Whether one more can be served, if need be in the place of another."""
        regular = [each for each in self.handlers if not each.surplus]
        return len(regular) < self.connection_limit or self.make_room(regular)

    def make_room(self, handlers):
        """End who waits and is due first; False if all of these are at work."""
        asking = {key.data for key, _ in self.selector.select(0)}
        idle = {each for each in handlers if each.awaited == EVENT_READ} - asking
        if idle:
            self.end(min(idle, key=lambda each: each.deadline))
        return bool(idle)

    def advance(self, handler):
        """Run a connection to its next wait, or to its end."""
        try:
            event = next(handler.steps)
            if event != handler.awaited:
                self.selector.modify(handler.request, event, handler)
                handler.awaited = event
        except OSError:
            self.end(handler)
        except Exception:
            self.handle_error(handler.request, handler.client_address)
            self.end(handler)

    def end(self, handler):
        handler.steps.close()  # it and the handler refer to each other
        self.handlers.remove(handler)
        self.selector.unregister(handler.request)
        self.shutdown_request(handler.request)

    def handle_error(self, request, client_address):
        with contextlib.suppress(OSError, ValueError):
            super().handle_error(request, client_address)


# ---- The command line --------------------------------------------------------
# Where the parts are put together: main() is the whole program on one screen.


def port_number(text):
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Says what the program is above its usage; a description would stand below."""

    def format_help(self):
        about = "eventbook: an event booking backend over HTTP"
        return f"{about}\n\n{super().format_help()}"


def parse_options():
    """What the command line and PORT say; exits with 2 if that is wrong."""
    users = "".join(f"  user-id: {user}  {role}\n" for user, role in USERS.items())
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    parser = Parser(
        epilog=f"users:\n{users}\nexample:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    port = os.environ.get("PORT") or "3000"
    option = parser.add_argument
    words = "where to listen, 0 for any free port (default: $PORT, or else 3000)"
    option("-p", "--port", type=port_number, default=port, help=words)
    option("--host", default="127.0.0.1", help="default: %(default)s")
    option("--log", metavar="FILE", default=DEFAULT_LOG, help="default: %(default)s")
    option("--version", action="version", version=f"eventbook {VERSION}")
    return parser.parse_args()


def console():
    """write(text) for stdout, without a buffer: nothing is left to flush at exit."""
    if sys.stdout is None:
        return lambda text: None
    raw = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)

    def write(text):
        octets = text.encode(sys.stdout.encoding, "replace")
        while octets:  # a pipe may take a part of them; one that never waits, nothing
            taken = raw.write(octets) or 0
            octets = octets[taken:]
            if not taken:
                time.sleep(0.01)

    return write


def open_store(log_path, notifier):
    """A Store whose bookings and cancellings are logged first; raises OSError."""
    store, log = Store(), Log(log_path)
    store.on("booking.created", log, notifier.confirm)
    store.on("booking.cancelled", log)
    store.on("event.updated", notifier.announce)
    return store


def main():
    options, notifier = parse_options(), Notifier(console())
    try:
        advice = f"cannot write {options.log}; name another file with --log"
        if options.log == DEFAULT_LOG:
            os.makedirs(os.path.dirname(DEFAULT_LOG), exist_ok=True)
        store = open_store(options.log, notifier)
        address = options.host, options.port
        advice = "cannot listen on {}:{}; try another --port or --host".format(*address)
        server = Server(address, store)
    except (OSError, TypeError) as error:
        sys.exit(f"eventbook: {advice} ({error})")

    def stop(_signal, _frame):
        server.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    host = "localhost" if options.host in ("127.0.0.1", "") else options.host
    host = f"[{host}]" if ":" in host else host
    notifier.say(f"eventbook listens on http://{host}:{server.server_address[1]}")
    notifier.start()
    server.serve_forever(poll_interval=0.1)
    notifier.close(timeout=2)


if __name__ == "__main__":
    main()
