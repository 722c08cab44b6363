"""eventbook: an event booking backend over HTTP, in one file, standard library only.

    python eventbook.py                    # http://localhost:3000; Ctrl-C stops it
    curl -H 'user-id: 2' http://localhost:3000/api/events

Organizers create and update events, customers list them, book tickets and cancel.

    event      Event(1, "Tech Conference 2026", "2026-02-15", 3, etag='"5f0c-1"')
    booking    Booking(1, 1, 2): booking 1 is one ticket of event 1 for customer 2
    operation  Store.book(store, request): what a route does
    refusal    Refusal(404, "Event not found"): what "refuses (404)" announces
    deadline   time.monotonic() + 16: when the server hangs up on a slow client

1. State changes only inside Store, under its lock, and only if no observer objects: a
   booking's line is in the log before the booking exists.
2. Code above the routes knows no socket, the HTTP below them no booking. A Request goes
   in; a record, an Answer or a Refusal comes out.
3. A thread serves each connection, and nobody else reads, writes or closes it. To end
   it from outside is to hang up: its thread wakes up, and finds the end.
"""

import _thread
import argparse
import contextlib
import email.utils
import functools
import json
import math
import os
import queue
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import types
import urllib.parse
from collections import OrderedDict, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = "1.0.0"
DEFAULT_LOG = os.path.abspath(os.path.join(__file__, "../logs/events.log.jsonl"))

# ---- Records and rules -------------------------------------------------------
# The nouns, and what is valid. A record never changes: another takes its place.

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
USERS = {"1": ORGANIZER, "2": CUSTOMER, "3": CUSTOMER}  # user-id -> role

Event = namedtuple("Event", "id title date availableTickets etag")
Booking = namedtuple("Booking", "id eventId customerId")
# data: what the JSON shows, or that JSON as bytes; fields: of this answer's header
Answer = namedtuple("Answer", "status data fields")


class Refusal(Exception):
    """Raised where a request cannot be granted; holds the Answer that says why."""

    def __init__(self, status, error, fields=None, **more):
        self.answer = Answer(status, {"error": error, **more}, fields or {})


def require(condition, status, error, fields=None, **more):
    """Refuse unless a condition holds."""
    if not condition:
        raise Refusal(status, error, fields, **more)


TIME = r"([01]\d|2[0-3]):[0-5]\d"
SECONDS = r":[0-5]\d(\.\d{1,9})?"
DATE = re.compile(rf"\d{{4}}-\d\d-\d\d(T{TIME}({SECONDS})?(Z|[+-]{TIME})?)?", re.ASCII)


def is_title(value):
    return isinstance(value, str) and len(value) <= 200 and bool(value.strip())


def is_date(value):
    with contextlib.suppress(TypeError, ValueError):  # no text; no such day
        # The pattern first: what else fromisoformat() takes depends on the Python.
        return DATE.fullmatch(value) and date.fromisoformat(value[:10])


def integer(least, most=math.inf):
    """A rule for whole numbers, but not True, 3.0 or "3"."""
    end = f"to {most:,}" if most < math.inf else "up"
    words = f"an integer from {least:,} {end}"
    return (lambda value: type(value) is int and least <= value <= most), words


# Rules by name: a test, and the words for what would pass it.
CREATE = {
    "title": (is_title, "text of 1 to 200 characters, not blank"),
    "date": (is_date, "a real date, like 2026-02-15 or 2026-02-15T19:30"),
    "availableTickets": integer(1, 10**9),
}
UPDATE = {**CREATE, "availableTickets": integer(0, 10**9)}  # 0: none for sale
PAGE = {"limit": integer(1, 1000), "offset": integer(0)}
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
    require(not wrong, 400, "Validation failed", details=wrong)


# ---- Requests and answers ----------------------------------------------------
# What an operation is given, and how what it returns is shown.


class Request(namedtuple("Request", "query fields content id user")):
    """The id is the one in the path; the names of fields are in lower case."""

    def json(self):
        """The content as a dict, empty if there is none; refuses (400)."""
        try:
            text = self.content.decode().lstrip("\ufeff")  # the mark: RFC 8259, 8.1
            value = json.loads(text or "{}")
            encode(value)  # refuses NaN, 1e400 and lone surrogates at any depth
        except (ValueError, RecursionError) as error:
            words = "not UTF-8, nested too deep, or an impossible number or character"
            problem = error if isinstance(error, json.JSONDecodeError) else words
            raise Refusal(400, f"Invalid JSON: {problem}") from None
        require(isinstance(value, dict), 400, "Invalid JSON: an object is wanted")
        return value

    def check_preconditions(self, etag, status):
        """Refuse (412, or status for If-None-Match) as RFC 9110, section 13.2, says."""
        tags = elements(self.fields.get("if-match", "*"))
        matches = tags == ["*"] or etag in tags  # a weak tag, W/"...", never does
        require(matches, 412, "Event has changed", {"ETag": etag})
        tags = elements(self.fields.get("if-none-match", ""))
        matches = tags == ["*"] or {etag, f"W/{etag}"} & {*tags}
        require(not matches, status, "Event has not changed", {"ETag": etag})


def elements(value):
    """The elements of a field's value that is a list (RFC 9110, section 5.6.1)."""
    return re.split("[ \t]*,[ \t]*", value)


ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(data):
    """A line of JSON in UTF-8; raises ValueError or RecursionError if there is none."""
    return ENCODER.encode(data).encode() + b"\n"


def visible(record):
    """What the JSON of a record shows: all but the ETag, which is a header field."""
    return {name: value for name, value in record._asdict().items() if name != "etag"}


@functools.lru_cache(maxsize=10_000)  # a list changes by a record or two at a time
def as_text(record):
    return ENCODER.encode(visible(record))


NUMBER = re.compile("[0-9]{1,4000}")  # int() takes no more than 4,300 digits


def page(query, rules, records):
    """The Answer with the part of a list that a query wants; refuses (400)."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    wanted = {k: int(v) if NUMBER.fullmatch(v) else v for k, v in pairs if k in rules}
    check(wanted, rules)
    if wanted.get("available") == "true":
        records = [event for event in records if event.availableTickets]
    part = records[wanted.get("offset", 0) :][: wanted.get("limit")]
    content = f"[{','.join(map(as_text, part))}]\n".encode()
    return Answer(200, content, {"X-Total-Count": len(records)})


# ---- Observers ---------------------------------------------------------------
# Who must know of a booking, a cancellation or an update hears of it before it happens.
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


class Log:
    """A JSON Lines file: an appended line survives kill -9, but not a power cut."""

    def __init__(self, path):
        """Create the file if there is none; raises OSError."""
        self.path, self.size = path, 0  # the size after our last line
        open(path, "a+b").close()

    def __call__(self, name, booking):
        """Append a line, or take back what was written of it and refuse (503)."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = {"event": name, "timestamp": now[:-6] + "Z", "data": booking._asdict()}
        line = encode(entry)
        # Opened each time, it is the file at the path, whoever moved or cut the last.
        with contextlib.suppress(OSError), open(self.path, "a+b", buffering=0) as file:
            size = file.tell()
            if size not in (0, self.size):  # somebody else wrote: half a line?
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) == len(line):
                self.size = size + len(line)
                return
            file.truncate(size)
        raise Refusal(503, "The log cannot be written", {"Retry-After": "5"})


class Notifier(threading.Thread):
    """Prints lines from its own thread, in order; outlives a write(text) that fails."""

    def __init__(self, write):
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
        while "" not in batch:  # close() sends it
            batch = [self.lines.get()]
            time.sleep(0.01)  # waking up for every line would slow bookings down
            batch += [self.lines.get() for _ in range(self.lines.qsize())]
            with contextlib.suppress(OSError, ValueError):
                self.write("".join(batch))

    def close(self, timeout):
        """Wait until all is printed, or for so many seconds."""
        self.lines.put("")
        self.join(timeout)


# ---- Store -------------------------------------------------------------------
# All there is, and the operations on it; GET / shows their docstrings.


class Store(Observable):
    """Events and bookings, in memory, for any number of threads."""

    def __init__(self):
        super().__init__()
        # The law of the lock: one `with` covers a check and its change, and whatever
        # reads. Observers run under it, so that log lines are in the order of changes.
        self.lock = threading.RLock()  # reentrant: operations use one another
        self.nonce = os.urandom(6).hex()  # so that no two runs share an ETag
        self.changes = self.last_booking = 0
        self.events = {}  # event id -> Event
        # The live bookings, each in both dicts and in order of id:
        self.sold = defaultdict(dict)  # event id -> {booking id -> customer id}
        self.held = defaultdict(dict)  # customer id -> {booking id -> event id}
        self.by_key = OrderedDict()  # (customer id, key) -> Booking, cancelled or not
        self.listed = {}  # the last query for events -> its Answer, until a change

    def create(self, request):
        """Put an event on sale."""
        given = request.json()
        values = {name: given.get(name) for name in CREATE}  # others are ignored
        check(values, CREATE)
        with self.lock:
            return self._put(Event(len(self.events) + 1, **values, etag=None))

    def update(self, request):
        """Change an event; the customers with a live booking are told."""
        values = request.json()
        with self.lock:
            event = self._find(request)
            request.check_preconditions(event.etag, status=412)
            is_same = integer(event.id, event.id)[0]  # not True, not 1.0
            check(values, {**UPDATE, "id": (is_same, "the id in the path")})
            # Each once, and even if nothing changes: the assignment says so.
            self.emit("event.updated", dict.fromkeys(self.sold[event.id].values()))
            same = event._replace(**values) == event
            return event if same else self._put(event, **values)

    def book(self, request):
        """Book one ticket; with an Idempotency-Key it is safe to ask again."""
        key = request.fields.get("idempotency-key")
        with self.lock:
            event = self._find(request)
            if key is not None:
                check({"Idempotency-Key": key}, KEY)
                first = self.by_key.get((request.user, key))
                if first:
                    require(first.eventId == event.id, 422, "Key of another event")
                    return first
            require(event.availableTickets, 400, "Booking failed: sold out")
            booking = Booking(self.last_booking + 1, event.id, request.user)
            self.emit("booking.created", booking)
            self.last_booking = booking.id
            self.sold[event.id][booking.id] = request.user
            self.held[request.user][booking.id] = event.id
            if key is not None:
                self.by_key[request.user, key] = booking
            if len(self.by_key) > 10_000:
                self.by_key.popitem(last=False)
            self._put(event, availableTickets=event.availableTickets - 1)
            return booking

    def cancel(self, request):
        """Cancel a booking of one's own; its ticket is free again."""
        with self.lock:
            booking = self.read_booking(request)
            self.emit("booking.cancelled", booking)
            del self.sold[booking.eventId][booking.id]
            del self.held[booking.customerId][booking.id]
            event = self.events[booking.eventId]
            self._put(event, availableTickets=event.availableTickets + 1)
            return booking

    def read_event(self, request):
        """Read an event."""
        with self.lock:
            event = self._find(request)
        request.check_preconditions(event.etag, status=304)
        return event

    def read_booking(self, request):
        """Read a booking of one's own."""
        with self.lock:
            owners = [user for user, held in self.held.items() if request.id in held]
            require(owners, 404, "Booking not found")
            require(owners == [request.user], 403, "Access denied")
            event_id = self.held[request.user][request.id]
            return Booking(request.id, event_id, request.user)

    def list_events(self, request):
        """List the events; ?available=true leaves out those sold out."""
        with self.lock:
            if request.query not in self.listed:
                events = list(self.events.values())
                self.listed = {request.query: page(request.query, EVENT_PAGE, events)}
            return self.listed[request.query]

    def list_bookings(self, request):
        """List an event's live bookings."""
        with self.lock:
            sold = self.sold[self._find(request).id].items()
            bookings = [Booking(id, request.id, customer) for id, customer in sold]
        return page(request.query, PAGE, bookings)

    def list_own(self, request):
        """List one's own live bookings."""
        with self.lock:
            held = self.held[request.user].items()
            bookings = [Booking(id, event_id, request.user) for id, event_id in held]
        return page(request.query, PAGE, bookings)

    # What follows is called with the lock held.

    def _find(self, request):
        require(request.id in self.events, 404, "Event not found")
        return self.events[request.id]

    def _put(self, event, **values):
        self.changes += 1
        self.listed = {}
        etag = f'"{self.nonce}-{self.changes}"'
        self.events[event.id] = event._replace(**values, etag=etag)
        return self.events[event.id]


# ---- Routes ------------------------------------------------------------------
# Which role may do what: said in one table, and checked before any operation runs.


def describe(_store, _request):
    """Say what this is and what it can do."""
    routes = [route._replace(does=route.does.__doc__)._asdict() for route in ROUTES]
    told = {"service": "eventbook", "version": VERSION, "routes": routes}
    return Answer(200, told, {})


Route = namedtuple("Route", "method path roles does message")
ROUTES = [
    Route("POST", "/api/events", [ORGANIZER], Store.create, None),
    Route("PUT", "/api/events/:id", [ORGANIZER], Store.update, "Event updated"),
    Route("GET", "/api/events", [CUSTOMER], Store.list_events, None),
    Route("POST", "/api/events/:id/book", [CUSTOMER], Store.book, "Booking successful"),
    Route("DELETE", "/api/bookings/:id", [CUSTOMER], Store.cancel, "Booking cancelled"),
    Route("GET", "/api/events/:id", [ORGANIZER, CUSTOMER], Store.read_event, None),
    Route("GET", "/api/events/:id/bookings", [ORGANIZER], Store.list_bookings, None),
    Route("GET", "/api/bookings", [CUSTOMER], Store.list_own, None),
    Route("GET", "/api/bookings/:id", [CUSTOMER], Store.read_booking, None),
    Route("GET", "/", [], describe, None),
]


def routes_at(path):
    """{method: Route} for a path; refuses (404)."""
    routes = {}
    for route in ROUTES:
        pattern = route.path.rstrip("/").replace(":id", NUMBER.pattern) + "/?"
        if re.fullmatch(pattern, path):
            routes[route.method] = route
    require(routes, 404, "Not found")
    if "GET" in routes:
        routes["HEAD"] = routes["GET"]
    return routes


@functools.lru_cache  # a client repeats its requests
def admit(method, path, user):
    """(Route, id in the path, user's number); refuses (404, 405, 401, 403)."""
    routes, ids = routes_at(path), NUMBER.findall(path)
    require(method in routes, 405, "Method not allowed", {"Allow": ", ".join(routes)})
    route = routes[method]
    if route.roles:
        require(user in USERS, 401, "Unauthorized", {"WWW-Authenticate": "user-id"})
        require(USERS[user] in route.roles, 403, "Access denied")
    return route, (int(ids[0]) if ids else None), (int(user) if route.roles else None)


def perform(store, route, request):
    """The Answer to a request that was admitted; refuses."""
    result = route.does(store, request)
    if isinstance(result, Answer):
        return result
    kind, data = type(result).__name__.lower(), visible(result)
    fields = {"ETag": result.etag} if kind == "event" else {}
    if route.method == "POST":
        fields["Location"] = f"/api/{kind}s/{result.id}"
    if route.message:
        data = {"message": route.message, kind: data}
    return Answer(201 if route.method == "POST" else 200, data, fields)


# ---- The head of a request ---------------------------------------------------
# The library's own reader hands the header to an e-mail parser, which forgives folded
# lines, bare line feeds, two lengths, no Host: ways to make two servers differ on where
# a request ends, or for whom it is (request smuggling). Here the request line must fit
# one pattern, and the rest of the head another. RFC 9112, sections 2 to 7.

LINE_LIMIT = 8 * 1024  # octets of the request line; nginx's default
HEADER_LIMIT = 16 * 1024  # octets of all field lines; Node.js's default
CONTENT_LIMIT = 64 * 1024  # octets; an event, all of it escaped, has less than 3,000

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(f'({TOKEN}) ([!"$-~]+) (HTTP/[1-9][.][0-9])\r\n')
HEADER = re.compile(f"({TOKEN}:[\t -~\x80-\xff]*\r\n)*\r\n")
NAME = "([0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"
AUTHORITY = rf"({NAME}|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\])(:[0-9]{{0,5}})?"
ABSOLUTE_FORM = re.compile(rf"^(?i:https?)://{AUTHORITY}(/|(?=\?|$))")


@functools.lru_cache  # a client repeats its request lines, and its headers
def parse_request_line(octets):
    """(method, path, query, version); refuses (400, 414, 505)."""
    require(len(octets) <= LINE_LIMIT + 2, 414, "Request line too long")  # 2: its end
    match = REQUEST_LINE.fullmatch(octets.decode("latin-1"))
    require(match, 400, "Malformed request line")
    method, target, version = match.groups()
    require(version in ("HTTP/1.0", "HTTP/1.1"), 505, "HTTP/1.0 and 1.1 are spoken")
    path, _, query = ABSOLUTE_FORM.sub("/", target).partition("?")
    is_target = path.startswith("/") or (method, target) == ("OPTIONS", "*")
    require(is_target, 400, "Invalid request target")
    return method, path, query, version


@functools.lru_cache
def parse_header(octets, version):
    """(fields, length, persistent, expects 100); refuses (400, 411, 413, 431)."""
    text, fields = octets.decode("latin-1"), {}
    require(len(octets) <= HEADER_LIMIT + 2, 431, "Header too large")
    require(HEADER.fullmatch(text), 400, "Malformed field line, or cut short")
    for line in text.split("\r\n")[:-2]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        # Repeated ones are joined by ", ", which no Host, length, user or key has.
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    host, length = fields.get("host", ""), fields.get("content-length", "0")
    is_host = re.fullmatch(AUTHORITY, host) or (version == "HTTP/1.0" and not host)
    require(is_host, 400, "Exactly one valid Host is needed")
    require(re.fullmatch("[0-9]+", length), 400, "Invalid Content-Length")
    status = 400 if "content-length" in fields else 411
    require("transfer-encoding" not in fields, status, "No Transfer-Encoding is taken")
    length = int(length.lstrip("0")[:9] or 0)  # int() takes 4,300 digits; 9 say enough
    require(length <= CONTENT_LIMIT, 413, "Content too large")
    is_1_1 = version == "HTTP/1.1"
    options = elements(fields.get("connection", "").lower())
    persistent = is_1_1 and "close" not in options
    expects = is_1_1 and fields.get("expect", "").lower() == "100-continue"
    return types.MappingProxyType(fields), length, persistent, expects


# ---- Connections -------------------------------------------------------------
# A thread each. It may wait for its client without a timer of its own, because the
# server knows by when each must be done, and hangs up on those that are not.

CONTENT = "Content-Type: application/json; charset=utf-8\r\nContent-Length: "
STANDING = "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
http_date = functools.lru_cache(email.utils.formatdate)


def hang_up(connection, how=socket.SHUT_RDWR):
    """Wake the thread of a connection: it finds the end, or cannot send any more."""
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(how)


class Handler(BaseHTTPRequestHandler):
    """A connection, from its first request to its last answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the second of two answers waits for 40 ms

    def handle_one_request(self):
        """Have the base call parse_request() and do_X(); answer what they raise."""
        self.close_connection, self.command = True, None  # until the request is read
        try:
            super().handle_one_request()
        except Refusal as refusal:
            self.send(refusal.answer)
            if self.close_connection:  # close() would take it back if more has come
                hang_up(self.connection, socket.SHUT_WR)
                while self.connection.recv(64 * 1024):  # RFC 9112, section 9.6
                    pass
        except Exception:
            self.close_connection = True
            with contextlib.suppress(OSError):  # or the defect would not be told
                self.send(Answer(500, {"error": "Internal server error"}, {}))
            raise  # for handle_error()

    def parse_request(self):
        """Read the head strictly; refuses."""
        if self.raw_requestline == b"\r\n":  # RFC 9112, 2.2: one in front is skipped
            self.raw_requestline = self.rfile.readline(LINE_LIMIT + 3)
        line = parse_request_line(self.raw_requestline)
        self.command, self.path, self.query, self.request_version = line
        octets = line = self.rfile.readline(HEADER_LIMIT)
        while line.strip(b"\r\n") and len(octets) <= HEADER_LIMIT + 2:
            line = self.rfile.readline(HEADER_LIMIT)
            octets += line
        self.headers, *self.framing = parse_header(octets, self.request_version)
        return True

    def do_GET(self):
        """Read the content and answer, whatever the method: the routes decide."""
        length, persistent, expects = self.framing
        asked = self.command, self.path, self.headers.get("user-id")
        if expects:
            admit(*asked)  # who would be refused is not told to continue
            self.handle_expect_100()
        content = self.rfile.read(length)
        require(len(content) == length, 400, "Content cut short")
        self.close_connection = not persistent
        self.server.deadlines[self.connection] = math.inf  # the client waits for us now
        route, id, user = admit(*asked)
        request = Request(self.query, self.headers, content, id, user)
        self.send(perform(self.server.store, route, request))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET
    do_CONNECT = do_OPTIONS = do_TRACE = do_GET

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses by itself: 414, and 501 before any content."""
        raise Refusal(code, self.responses[code][0])

    def send(self, answer):
        """Write an answer in one piece; send_response() would also name the Python."""
        status, data, fields = answer
        content = data if isinstance(data, bytes) else encode(data)
        head = f"{self.protocol_version} {status} {self.responses[status][0]}\r\n"
        head += f"{STANDING}Date: {http_date(int(time.time()), usegmt=True)}\r\n"
        head += f"{CONTENT}{len(content)}\r\n" if status != 304 else ""
        # A second less than it is kept, or a client may send just when it ends.
        kept = f"Keep-Alive: timeout={self.server.patience - 1:.0f}\r\n"
        head += "Connection: close\r\n" if self.close_connection else kept
        head += "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        content = b"" if self.command == "HEAD" or status == 304 else content
        self.server.deadlines[self.connection] = time.monotonic() + self.server.patience
        self.wfile.write(f"{head}\r\n".encode() + content)


class Server(ThreadingHTTPServer):
    """Accepts connections, and hangs up on those that keep it waiting."""

    allow_reuse_address = os.name == "posix"  # elsewhere two servers would share a port
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's own asks the DNS
    connection_limit = request_queue_size = 512  # as many as an nginx worker has
    patience = 16.0  # seconds to take an answer and send the next request, whole
    grace = 2.0  # seconds to take an answer when the server stops

    def __init__(self, address, store):
        """Listen; raises OSError, or TypeError if the host cannot be encoded."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.store, self.deadlines = store, {}  # connection -> when to hang up
        self.pool = ThreadPoolExecutor(self.connection_limit)
        super().__init__(address, Handler)

    def process_request(self, request, client_address):
        """Give a connection a thread, and if need be the room of another."""
        self.deadlines[request] = time.monotonic() + self.patience
        while len(self.deadlines) > self.connection_limit:
            deadlines = self.deadlines.copy()
            first_due = min(deadlines, key=deadlines.get)
            self.deadlines.pop(first_due, None)
            hang_up(first_due)
        # To start a thread, as the base does here, takes longer than most answers.
        self.pool.submit(self.process_request_thread, request, client_address)

    def service_actions(self):
        """Look for who is overdue; serve_forever() calls this, often."""
        now = time.monotonic()
        for connection, deadline in self.deadlines.copy().items():
            if deadline < now:
                hang_up(connection)

    def close_request(self, request):
        self.deadlines.pop(request, None)
        super().close_request(request)

    def handle_error(self, request, client_address):
        """Tell stderr of a defect, but not of a client that has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        """Answer the requests that have arrived, and no others; wait for `grace`."""
        self.socket.settimeout(0.01)
        with contextlib.suppress(OSError):  # until nobody stands in the queue
            for _ in range(self.request_queue_size):
                self.process_request(*self.get_request())
        super().server_close()
        for connection in self.deadlines.copy():
            hang_up(connection, socket.SHUT_RD)
        end = time.monotonic() + self.grace
        while self.deadlines and time.monotonic() < end:
            time.sleep(0.01)
        for connection in self.deadlines.copy():
            hang_up(connection)
        self.pool.shutdown()


# ---- The command line --------------------------------------------------------
# Where the parts are put together: main() is the whole program on one screen.


def port_number(text):
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def parse_options():
    """What the command line and PORT say; exits with 2 if that is wrong."""
    users = "".join(f"  user-id: {user}  {role}\n" for user, role in USERS.items())
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    parser = argparse.ArgumentParser(
        description="eventbook: an event booking backend over HTTP",
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


def write(text):
    """Print, past stdout's buffer, so that nothing is left to fail at the exit."""
    if sys.stdout:  # None if the program was started without one
        how = {"encoding": sys.stdout.encoding, "errors": "replace", "closefd": False}
        with open(sys.stdout.fileno(), "w", **how) as console:
            console.write(text)


def open_store(log_path, notifier):
    """A Store whose bookings and cancellings are logged first; raises OSError."""
    if log_path == DEFAULT_LOG:  # no other folder is made: it may be a slip
        os.makedirs(os.path.dirname(DEFAULT_LOG), exist_ok=True)
    store, log = Store(), Log(log_path)
    store.on("booking.created", log, notifier.confirm)
    store.on("booking.cancelled", log)
    store.on("event.updated", notifier.announce)
    return store


def keep_to_one_processor():
    """Python runs one thread at a time; to hand its lock to a thread that waits on
    another processor takes longer than most answers (the README has the figures)."""
    with contextlib.suppress(AttributeError, OSError):  # Linux has it, few others have
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def stop_by_signal(server):
    """Have SIGINT, SIGTERM and SIGHUP shut a server down, a second SIGINT kill it."""

    def stop(_number, _frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # A bare thread: what a signal interrupts may hold a lock of threading's.
        _thread.start_new_thread(server.shutdown, ())

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none, nohup has it ignored
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        signal.signal(hangup, stop)


def main():
    options, notifier = parse_options(), Notifier(write)
    host, port = options.host, options.port
    try:
        advice = f"cannot write {options.log}; name another file with --log"
        store = open_store(options.log, notifier)
        advice = f"cannot listen on {host}:{port}; try another --port or --host"
        server = Server((host, port), store)
    except (OSError, TypeError) as error:
        sys.exit(f"eventbook: {advice} ({error})")
    keep_to_one_processor()
    stop_by_signal(server)
    host = "localhost" if host in ("127.0.0.1", "") else host
    host = f"[{host}]" if ":" in host else host
    notifier.say(f"eventbook listens on http://{host}:{server.server_address[1]}")
    notifier.start()
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    notifier.close(timeout=2)


if __name__ == "__main__":
    main()
