"""eventbook: an event booking backend over HTTP, in one file, standard library only.

    python eventbook.py                    # http://localhost:3000; Ctrl-C stops it
    curl -H 'user-id: 2' http://localhost:3000/api/events

Organizers create and update events, customers list them, book tickets and cancel.

    event      Event(1, "Tech Conference 2026", "2026-02-15", 3, etag='"5f0c-1"')
    booking    Booking(1, 1, 2): booking 1 is one ticket of event 1 for customer 2
    operation  Store.book(store, request): what a route calls
    response   Response(200, {"id": 1}, {"ETag": '"5f0c-1"'}): status, data, headers
    error      HTTPError(404, "Event not found"): an exception that holds a response

The path of a request: Server accepts a connection and gives it a thread; Handler parses
the request, checks the route and the role, and reads the body; dispatch() calls an
operation of Store; Handler sends the response.

1. State changes only inside Store, under its lock. A booking or a cancellation is in
   the log before the state changes.
2. Code above the routes does not touch sockets. The HTTP code below them does not know
   what an event or a booking is.
3. Once a connection has a thread, only that thread reads, writes and closes it. Server
   can shut the socket down, which makes the recv() or send() of the thread return.
"""

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
import urllib.parse
from collections import OrderedDict, defaultdict, namedtuple
from datetime import date, datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = "1.0.0"
DEFAULT_LOG = os.path.join(os.path.dirname(__file__), "logs", "events.log.jsonl")

# ---- Records and rules -------------------------------------------------------
# Records are immutable: an update replaces one. Rules say which values are valid.

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
USERS = {"1": ORGANIZER, "2": CUSTOMER, "3": CUSTOMER}  # user-id -> role

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Record:
    """Adds to a namedtuple its representation as JSON."""

    def members(self):
        """Return what the JSON shows: all but the ETag, which is sent as a header."""
        return {k: v for k, v in self._asdict().items() if k != "etag"}

    @functools.cached_property  # A record is encoded once, however often it is listed.
    def json_text(self):
        return ENCODER.encode(self.members())


class Event(Record, namedtuple("Event", "id title date availableTickets etag")):
    pass


class Booking(Record, namedtuple("Booking", "id eventId customerId")):
    pass


# The data is an object to encode as JSON, or bytes that are JSON already.
Response = namedtuple("Response", "status data headers")


class HTTPError(Exception):
    """Ends the processing of a request; `response` is what the client gets."""

    def __init__(self, status, error, headers=None, **members):
        self.response = Response(status, {"error": error, **members}, headers or {})


def require(condition, status, error, headers=None, **members):
    """Raise HTTPError unless the condition is true."""
    if not condition:
        raise HTTPError(status, error, headers, **members)


TIME = r"([01]\d|2[0-3]):[0-5]\d"
SECONDS = r":[0-5]\d(\.\d{1,9})?"
DATE = re.compile(rf"\d{{4}}-\d\d-\d\d(T{TIME}({SECONDS})?(Z|[+-]{TIME})?)?", re.ASCII)


def is_title(value):
    return isinstance(value, str) and len(value) <= 200 and bool(value.strip())


def is_date(value):
    with contextlib.suppress(TypeError, ValueError):  # The value is not a date.
        # The pattern is checked too: what fromisoformat() accepts varies by version.
        return bool(DATE.fullmatch(value) and date.fromisoformat(value[:10]))


# is_valid(value) is true for a valid value; the description tells which are valid.
Rule = namedtuple("Rule", "is_valid description")


def integer(minimum, maximum=math.inf):
    """Return a Rule for an int in a range; True, 3.0 and "3" are not valid."""
    end = f"to {maximum:,}" if maximum < math.inf else "upwards"
    description = f"must be an integer from {minimum:,} {end}"
    return Rule(lambda v: type(v) is int and minimum <= v <= maximum, description)


CREATE_RULES = {
    "title": Rule(is_title, "must be a string of 1 to 200 characters, not blank"),
    "date": Rule(is_date, "must be a date such as 2026-02-15 or 2026-02-15T19:30"),
    "availableTickets": integer(1, 10**9),
}
# An organizer can stop the sale by setting the tickets to 0.
UPDATE_RULES = {**CREATE_RULES, "availableTickets": integer(0, 10**9)}
PAGE_RULES = {"limit": integer(1, 1000), "offset": integer(0)}
FLAG = Rule(lambda value: value in ("true", "false"), "must be true or false")
EVENT_LIST_RULES = {**PAGE_RULES, "available": FLAG}
KEY = re.compile("[!-~]{1,255}")
KEY_RULE = Rule(KEY.fullmatch, "must be 1 to 255 visible ASCII characters")
UNKNOWN_FIELD = Rule(lambda value: False, "unknown field")


def validate(values, rules):
    """Raise HTTPError (400) if a value breaks its rule or has no rule."""
    details = {}
    for name, value in values.items():
        rule = rules.get(name, UNKNOWN_FIELD)
        if not rule.is_valid(value):
            details[name] = rule.description
    require(not details, 400, "Validation failed", details=details)


# ---- Requests and responses --------------------------------------------------
# What an operation gets, and how lists become JSON.


class Request(namedtuple("Request", "query headers body id user")):
    """`id` is from the path, `user` from header user-id. Header names: lower-case."""

    def json(self):
        """Return the body as a dict, {} if it is empty; raises HTTPError (400)."""
        try:
            text = self.body.decode().lstrip("\ufeff")  # \ufeff is a byte order mark.
            value = json.loads(text or "{}")
            encode(value)  # encode() rejects NaN, 1e400 and lone surrogates.
        except json.JSONDecodeError as error:
            raise HTTPError(400, f"Invalid JSON: {error}") from None
        except (ValueError, RecursionError):
            reason = "not UTF-8, nested too deeply, or an invalid number or character"
            raise HTTPError(400, f"Invalid JSON: {reason}") from None
        require(isinstance(value, dict), 400, "The JSON body must be an object")
        return value

    def check_preconditions(self, etag, status):
        """Raise HTTPError: 412 if If-Match fails, `status` if If-None-Match does."""
        if "if-match" in self.headers:
            tags = split_list(self.headers["if-match"])
            matches = tags == ["*"] or etag in tags  # A weak tag, W/"1", never matches.
            require(matches, 412, "Event has changed", {"ETag": etag})
        if "if-none-match" in self.headers:
            tags = split_list(self.headers["if-none-match"])
            matches = tags == ["*"] or etag in tags or f"W/{etag}" in tags
            require(not matches, status, "Event has not changed", {"ETag": etag})


def split_list(value):
    """Return the elements of a comma-separated header (RFC 9110, 5.6.1)."""
    return [element.strip(" \t") for element in value.split(",")]


def encode(data):
    """Return a line of JSON as bytes; raises ValueError or RecursionError."""
    return ENCODER.encode(data).encode() + b"\n"


NUMBER = re.compile("[0-9]{1,600}")  # int() can be limited to 640 digits.


def paginate(query, rules, records):
    """Return the Response with the requested part of a list; raises HTTPError (400)."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    values = {k: int(v) if NUMBER.fullmatch(v) else v for k, v in pairs if k in rules}
    validate(values, rules)
    if values.get("available") == "true":
        records = [event for event in records if event.availableTickets > 0]
    page = records[values.get("offset", 0) :][: values.get("limit")]
    body = f"[{','.join([record.json_text for record in page])}]\n".encode()
    return Response(200, body, {"X-Total-Count": len(records)})


# ---- Observers ---------------------------------------------------------------
# The store calls its observers before a change. An observer that raises an exception
# prevents the change, so those that may raise one must be registered first. Log is an
# observer. Others, in open_store(), notify by means of a Printer.


class Observable:
    """Calls the functions that are registered for a name, such as booking.created."""

    def __init__(self):
        self.observers = defaultdict(list)

    def on(self, name, *observers):
        """Register functions, which emit(name, data) calls as observer(name, data)."""
        self.observers[name] += observers

    def emit(self, name, data):
        for observer in self.observers[name]:
            observer(name, data)


class Log:
    """A JSON Lines file. Its lines survive kill -9, but not a power failure."""

    def __init__(self, path, report):
        """Create the log file if it does not exist; raises OSError."""
        self.path, self.report, self.failing = path, report, False
        open(path, "a+b").close()

    def __call__(self, name, booking):
        """Append a line. On failure, undo a partial write and raise HTTPError (503)."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = {"event": name, "timestamp": now[:-6] + "Z", "data": booking._asdict()}
        line = encode(entry)
        try:
            # The file is opened for each line, because it may be renamed or removed.
            with open(self.path, "a+b", buffering=0) as file:
                size = file.tell()
                if size > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # A crash left an incomplete line.
                        line = b"\n" + line
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError("only a part of the line was written")
            self.failing = False
        except OSError as error:
            if not self.failing:  # A log outage is reported once, not per request.
                self.report(f"eventbook: cannot write the log: {error}")
            self.failing = True
            headers = {"Retry-After": "5"}
            raise HTTPError(503, "The log cannot be written", headers) from None


class Printer(threading.Thread):
    """Prints lines in order from its own thread, so that no request waits for it."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.lines = stream, queue.SimpleQueue()

    def say(self, line):
        """Queue a line; never blocks or fails."""
        self.lines.put(line + "\n")

    def run(self):
        batch = []
        while "" not in batch:  # close() queues an empty string to end the loop.
            batch = [self.lines.get()]
            time.sleep(0.01)  # Several lines are then printed with one write.
            batch += [self.lines.get() for _ in range(self.lines.qsize())]
            with contextlib.suppress(OSError, ValueError):
                write(self.stream, "".join(batch))

    def close(self, timeout):
        """Wait until all lines are printed, at most `timeout` seconds."""
        self.lines.put("")
        self.join(timeout)


def write(stream, text):
    """Write to a stream's descriptor, not its buffer: a flush at exit may fail."""
    if stream:  # sys.stdout is None if the program was started without it.
        settings = {"encoding": stream.encoding, "errors": "replace", "closefd": False}
        with open(stream.fileno(), "w", **settings) as file:
            file.write(text)


# ---- Store -------------------------------------------------------------------
# The state, and the operations on it, whose docstrings are shown by GET /.


class Store(Observable):
    """Events and bookings in memory, for any number of threads."""

    def __init__(self):
        super().__init__()
        # A thread must hold the lock from a check to the change that depends on it, and
        # during every read. Observers run under it too, so that log lines are in order.
        self.lock = threading.RLock()  # reentrant, as cancel() calls read_booking()
        self.nonce = os.urandom(6).hex()  # part of every ETag; differs between runs
        self.changes = self.last_booking = 0
        self.events = {}  # event id -> Event
        self.bookings = {}  # booking id -> Booking, without the cancelled ones
        self.by_event = defaultdict(set)  # event id -> ids of its live bookings
        self.by_customer = defaultdict(set)  # customer id -> ids of its live bookings
        self.by_key = OrderedDict()  # (customer id, Idempotency-Key) -> Booking
        self.list_cache = None, None  # query and Response of the last list_events()

    def create(self, request):
        """Create an event."""
        body = request.json()
        # Unknown fields are ignored: a misspelt one is reported as missing.
        values = {name: body.get(name) for name in CREATE_RULES}
        validate(values, CREATE_RULES)
        with self.lock:
            return self._put(Event(len(self.events) + 1, **values, etag=None))

    def update(self, request):
        """Update an event and notify the customers who have booked it."""
        values = request.json()
        with self.lock:
            event = self._find(request)
            request.check_preconditions(event.etag, status=412)
            description = "must be the id in the path"
            same_id = Rule(lambda v: type(v) is int and v == event.id, description)
            # Unknown fields are errors: ignoring a misspelt one would lose the edit.
            validate(values, {**UPDATE_RULES, "id": same_id})
            # Notify each customer once per update, even if it changes nothing.
            bookings = self._bookings(self.by_event[event.id])
            self.emit("event.updated", dict.fromkeys(b.customerId for b in bookings))
            if event._replace(**values) == event:
                return event
            return self._put(event, **values)

    def book(self, request):
        """Book one ticket; an Idempotency-Key makes retries safe."""
        key = request.headers.get("idempotency-key")
        with self.lock:
            event = self._find(request)
            if key is not None:
                validate({"Idempotency-Key": key}, {"Idempotency-Key": KEY_RULE})
                first = self.by_key.get((request.user, key))
                if first:  # This is a retry, perhaps after the booking was cancelled.
                    message = "Idempotency-Key was used for another event"
                    require(first.eventId == event.id, 422, message)
                    return first
            require(event.availableTickets > 0, 400, "Booking failed: sold out")
            booking = Booking(self.last_booking + 1, event.id, request.user)
            self.emit("booking.created", booking)
            self.last_booking = booking.id
            self.bookings[booking.id] = booking
            self.by_event[event.id].add(booking.id)
            self.by_customer[request.user].add(booking.id)
            if key is not None:
                self.by_key[request.user, key] = booking
            if len(self.by_key) > 10_000:
                self.by_key.popitem(last=False)
            self._put(event, availableTickets=event.availableTickets - 1)
            return booking

    def cancel(self, request):
        """Cancel your booking and release its ticket."""
        with self.lock:
            booking = self.read_booking(request)
            self.emit("booking.cancelled", booking)
            del self.bookings[booking.id]
            self.by_event[booking.eventId].remove(booking.id)
            self.by_customer[booking.customerId].remove(booking.id)
            event = self.events[booking.eventId]
            self._put(event, availableTickets=event.availableTickets + 1)
            return booking

    def read_event(self, request):
        """Get an event."""
        with self.lock:
            event = self._find(request)
        request.check_preconditions(event.etag, status=304)
        return event

    def read_booking(self, request):
        """Get your booking."""
        with self.lock:
            booking = self.bookings.get(request.id)
        require(booking, 404, "Booking not found")
        require(booking.customerId == request.user, 403, "Access denied")
        return booking

    def list_events(self, request):
        """List events; ?available=true omits those that are sold out."""
        with self.lock:
            if self.list_cache[0] != request.query:
                events = list(self.events.values())
                response = paginate(request.query, EVENT_LIST_RULES, events)
                self.list_cache = request.query, response
            return self.list_cache[1]

    def list_bookings(self, request):
        """List the live bookings of an event."""
        with self.lock:
            bookings = self._bookings(self.by_event[self._find(request).id])
        return paginate(request.query, PAGE_RULES, bookings)

    def list_own_bookings(self, request):
        """List your live bookings."""
        with self.lock:
            bookings = self._bookings(self.by_customer[request.user])
        return paginate(request.query, PAGE_RULES, bookings)

    # Callers of the following methods must hold the lock.

    def _find(self, request):
        require(request.id in self.events, 404, "Event not found")
        return self.events[request.id]

    def _bookings(self, ids):
        return [self.bookings[id] for id in sorted(ids)]

    def _put(self, event, **values):
        self.changes += 1
        self.list_cache = None, None
        etag = f'"{self.nonce}-{self.changes}"'
        self.events[event.id] = event._replace(**values, etag=etag)
        return self.events[event.id]


# ---- Routes ------------------------------------------------------------------
# One table says which role may call which operation. authorize() looks it up.


def describe(_store, _request):
    """Describe this service and its routes."""
    routes = [r._replace(operation=r.operation.__doc__)._asdict() for r in ROUTES]
    data = {"service": "eventbook", "version": VERSION, "routes": routes}
    return Response(200, data, {})


Route = namedtuple("Route", "method path roles operation message")
ROUTES = [
    Route("POST", "/api/events", [ORGANIZER], Store.create, None),
    Route("PUT", "/api/events/:id", [ORGANIZER], Store.update, "Event updated"),
    Route("GET", "/api/events", [CUSTOMER], Store.list_events, None),
    Route("POST", "/api/events/:id/book", [CUSTOMER], Store.book, "Booking successful"),
    Route("DELETE", "/api/bookings/:id", [CUSTOMER], Store.cancel, "Booking cancelled"),
    Route("GET", "/api/events/:id", [ORGANIZER, CUSTOMER], Store.read_event, None),
    Route("GET", "/api/events/:id/bookings", [ORGANIZER], Store.list_bookings, None),
    Route("GET", "/api/bookings", [CUSTOMER], Store.list_own_bookings, None),
    Route("GET", "/api/bookings/:id", [CUSTOMER], Store.read_booking, None),
    Route("GET", "/", [], describe, None),
]


@functools.lru_cache  # Clients repeat requests, so results are cached.
def authorize(method, path, user):
    """Return (Route, id or None, user id); raises HTTPError (404, 405, 401, 403)."""
    routes, id = {}, None
    for route in ROUTES:
        pattern = route.path.rstrip("/").replace(":id", f"({NUMBER.pattern})") + "/?"
        match = re.fullmatch(pattern, path)
        if match:
            routes[route.method] = route
            id = int(match[1]) if ":id" in route.path else None
    require(routes, 404, "Not found")
    if "GET" in routes:
        routes["HEAD"] = routes["GET"]
    require(method in routes, 405, "Method not allowed", {"Allow": ", ".join(routes)})
    route = routes[method]
    if not route.roles:
        return route, id, None
    require(user in USERS, 401, "Unauthorized", {"WWW-Authenticate": "user-id"})
    require(USERS[user] in route.roles, 403, "Access denied")
    return route, id, int(user)


def dispatch(store, route, request):
    """Call the operation of a route and return its Response; raises HTTPError."""
    result = route.operation(store, request)
    if isinstance(result, Response):
        return result
    name = "event" if isinstance(result, Event) else "booking"
    headers = {"ETag": result.etag} if name == "event" else {}
    data = result.members()
    if route.message:
        data = {"message": route.message, name: data}
    if route.method == "POST":
        headers["Location"] = f"/api/{name}s/{result.id}"
    return Response(201 if route.method == "POST" else 200, data, headers)


# ---- Request parsing ---------------------------------------------------------
# http.server parses headers with the e-mail parser, which accepts folded lines, bare
# line feeds, two lengths and no Host. Two servers can then disagree on where a request
# ends, which enables request smuggling. So one pattern must match the request line, and
# another one the headers (RFC 9112, sections 2 to 7).

REQUEST_LINE_LIMIT = 8 * 1024  # bytes; nginx's default
HEADERS_LIMIT = 16 * 1024  # bytes of all header lines; Node.js's default
BODY_LIMIT = 64 * 1024  # bytes; a valid event needs at most 3,000

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(f'({TOKEN}) ([!"$-~]+) (HTTP/[1-9][.][0-9])\r\n')
HEADERS = re.compile(f"({TOKEN}:[\t -~\x80-\xff]*\r\n)*\r\n")
NAME = "([0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"
AUTHORITY = rf"({NAME}|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\])(:[0-9]{{0,5}})?"
ABSOLUTE_FORM = re.compile(rf"^(?i:https?)://{AUTHORITY}(/|(?=\?|$))")


@functools.lru_cache  # Request lines repeat, so parsed ones are cached.
def parse_request_line(line):
    """Return (method, path, query, version); raises HTTPError (400, 414, 505)."""
    require(len(line) <= REQUEST_LINE_LIMIT + len("\r\n"), 414, "Request line too long")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    require(match, 400, "Malformed request line")
    method, target, version = match.groups()
    require(version in ("HTTP/1.0", "HTTP/1.1"), 505, "Use HTTP/1.0 or HTTP/1.1")
    path, _, query = ABSOLUTE_FORM.sub("/", target).partition("?")
    is_valid = path.startswith("/") or (method, target) == ("OPTIONS", "*")
    require(is_valid, 400, "Invalid request target")
    return method, path, query, version


@functools.lru_cache
def parse_headers(lines, version):
    """Return (headers, body length, keep alive?, expects 100?) of a request.

    Raises HTTPError (400, 411, 413, 431). The dict is cached: do not change it.
    """
    text = lines.decode("latin-1")
    require(len(lines) <= HEADERS_LIMIT + len("\r\n"), 431, "Headers too large")
    require(HEADERS.fullmatch(text), 400, "Malformed or incomplete header line")
    values = defaultdict(list)
    for line in text.split("\r\n")[:-2]:
        name, _, value = line.partition(":")
        values[name.lower()].append(value.strip(" \t"))
    # Repeated headers are joined by ", ", which is never valid in Host, Content-Length,
    # user-id or Idempotency-Key.
    headers = {name: ", ".join(parts) for name, parts in values.items()}
    is_1_1 = version == "HTTP/1.1"
    host = headers.get("host", "")
    if host or is_1_1:  # HTTP/1.0 needs no Host.
        is_host = re.fullmatch(AUTHORITY, host)
        require(is_host, 400, "Exactly one valid Host is required")
    length = headers.get("content-length", "0")
    require(re.fullmatch("[0-9]+", length), 400, "Invalid Content-Length")
    # A request with both Transfer-Encoding and Content-Length may be an attack.
    status = 400 if "content-length" in headers else 411
    require("transfer-encoding" not in headers, status, "Transfer-Encoding unsupported")
    length = int(length.lstrip("0")[:9] or 0)  # A 9-digit length exceeds BODY_LIMIT.
    require(length <= BODY_LIMIT, 413, "Body too large")
    options = split_list(headers.get("connection", "").lower())
    expects_100 = is_1_1 and headers.get("expect", "").lower() == "100-continue"
    return headers, length, is_1_1 and "close" not in options, expects_100


# ---- Connections -------------------------------------------------------------
# Handler serves one connection. Its thread waits for the client without a timeout,
# because Server drops the connections that are idle for too long.

COMMON_HEADERS = ["Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
CONTENT_TYPE = "Content-Type: application/json; charset=utf-8"
http_date = functools.lru_cache(maxsize=1)(email.utils.formatdate)  # once a second


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection.

    For each request the base class reads the request line and calls parse_request(). If
    that returns True, it calls do_GET(), do_POST() or another, which are all respond(),
    or send_error() for an unknown method. It stops when close_connection is True.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm delays a pipelined response.

    def parse_request(self):
        """Parse the request line and the headers; return False if they are invalid."""
        self.close_connection, self.command = True, None  # for invalid requests
        if self.raw_requestline == b"\r\n":  # An empty line is skipped: RFC 9112, 2.2.
            self.raw_requestline = self.rfile.readline(REQUEST_LINE_LIMIT + 3)
            if not self.raw_requestline:
                return False
        try:
            parsed = parse_request_line(self.raw_requestline)
            self.command, self.path, self.query, self.request_version = parsed
            line, lines = None, bytearray()
            while line not in (b"\r\n", b"\n", b"") and len(lines) <= HEADERS_LIMIT + 2:
                line = self.rfile.readline(HEADERS_LIMIT + 3)
                lines += line
            parsed = parse_headers(bytes(lines), self.request_version)
            self.headers, self.length, self.keep_alive, self.expects_100 = parsed
            return True
        except HTTPError as error:
            self.send(error.response)
            return False

    def respond(self):
        """Send the response to a request of any method; the routes list the methods."""
        try:
            response = self.perform()
        except HTTPError as error:
            response = error.response
        except Exception:  # a bug, or the client has disconnected
            self.server.handle_error(self.connection, self.client_address)
            self.close_connection = True
            response = HTTPError(500, "Internal server error").response
        self.send(response)

    def perform(self):
        """Check the role, read the body and return the response; raises HTTPError."""
        # Close unless the body gets read, or it would be taken for the next request.
        self.close_connection = self.length > 0 or not self.keep_alive
        user_id = self.headers.get("user-id")
        route, id, user = authorize(self.command, self.path, user_id)
        if self.expects_100:
            self.handle_expect_100()
        body = self.rfile.read(self.length)
        require(len(body) == self.length, 400, "Incomplete body")
        self.close_connection = not self.keep_alive
        self.server.claim(self.connection)  # The client is kept until send().
        request = Request(self.query, self.headers, body, id, user)
        return dispatch(self.server.store, route, request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = respond
    do_CONNECT = do_OPTIONS = do_TRACE = respond

    def send_error(self, code, message=None, explain=None):
        """Send an error that the base class detects: 414, or 501 for the method."""
        self.close_connection = True
        self.send(HTTPError(code, self.responses[code][0]).response)

    def send(self, response):
        """Send a response with one write(); send_header() would be slower."""
        status, data, headers = response
        body = data if isinstance(data, bytes) else encode(data)
        # A full server closes the connection to make room for another client.
        self.close_connection = self.close_connection or self.server.is_full()
        # The client is told one second less than the limit, so that it stops in time.
        keep_alive = f"Keep-Alive: timeout={self.server.client_timeout - 1}"
        lines = [
            f"HTTP/1.1 {status} {self.responses[status][0]}",
            f"Date: {http_date(int(time.time()), usegmt=True)}",
            "Connection: close" if self.close_connection else keep_alive,
            *COMMON_HEADERS,
            *[f"{name}: {value}" for name, value in headers.items()],
        ]
        if status != 304:
            lines += [CONTENT_TYPE, f"Content-Length: {len(body)}"]
        body = b"" if status == 304 or self.command == "HEAD" else body
        self.server.wait_for_client(self.connection)  # Slow reading counts as idle.
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)

    def finish(self):
        """Wait for the client to close, or it may lose the response (RFC 9112, 9.6)."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(64 * 1024):
                pass


class Server(ThreadingHTTPServer):
    """Accepts connections, gives each a thread, and drops clients that are idle.

    A connection is idle while the server waits for its client, to send a request or to
    read a response. The thread of a connection calls claim() before it performs a
    request; then the server does not drop the client until the response is being sent.
    After a client was dropped, no request of it is performed.
    """

    allow_reuse_address = os.name == "posix"  # On Windows, SO_REUSEADDR shares a port.
    # HTTPServer.server_bind() makes a DNS lookup, which can take seconds.
    server_bind = socketserver.TCPServer.server_bind
    connection_limit = 512  # open connections; an nginx worker has as many
    request_queue_size = 4096  # clients that wait to be accepted; Linux's default
    client_timeout = 16  # seconds that a client may be idle
    idle_timeout = 1  # seconds that a client may be idle while others wait
    shutdown_timeout = 2  # seconds to answer the last requests when the server stops

    def __init__(self, address, store):
        """Bind and listen; raises OSError, OverflowError (port) or TypeError (host)."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.store, self.connections = store, set()
        self.lock, self.idle_since = threading.Lock(), {}  # idle connection -> time
        self.free_threads = threading.Semaphore(0)  # how many threads are free
        self.accepted = queue.SimpleQueue()  # connections waiting for a free thread
        files = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
        if files > 0:  # 24 descriptors are reserved: log, console, closing sockets.
            self.connection_limit = max(8, min(self.connection_limit, files - 24))
        super().__init__(address, Handler)

    def is_full(self):
        return len(self.connections) >= self.connection_limit

    def wait_for_client(self, connection):
        with self.lock:
            self.idle_since[connection] = time.monotonic()

    def claim(self, connection):
        """Note that a connection is busy; raises HTTPError (408) if it was dropped."""
        with self.lock:
            since = self.idle_since.pop(connection, None)
        require(since is not None, 408, "Request timed out")

    def drop_idle(self, seconds):
        """Drop the longest idle client; return False if none is idle for `seconds`."""
        with self.lock, contextlib.suppress(OSError):  # The client has disconnected.
            connection = min(self.idle_since, key=self.idle_since.get, default=None)
            limit = time.monotonic() - seconds
            if connection is None or self.idle_since[connection] > limit:
                return False
            del self.idle_since[connection]
            self.connections.discard(connection)
            connection.shutdown(socket.SHUT_RDWR)
        return True

    def service_actions(self):
        """Drop clients that are idle too long; serve_forever() calls this regularly."""
        while self.drop_idle(self.client_timeout):
            pass

    def get_request(self):
        """Accept a connection; raises OSError if there is no room for one."""
        with contextlib.suppress(OSError):  # The system has no file descriptor left.
            if not self.is_full():
                return super().get_request()
        if not self.drop_idle(self.idle_timeout):
            time.sleep(0.005)
        raise BlockingIOError  # The base class ignores this error and tries again.

    def process_request(self, request, client_address):
        """Give a connection to a free thread, or to a new one if none is free."""
        self.connections.add(request)
        self.wait_for_client(request)
        if self.free_threads.acquire(blocking=False):
            self.accepted.put((request, client_address))
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # The system allows no more threads.
            self.shutdown_request(request)

    def process_request_thread(self, *arguments):
        """Serve one connection after another: starting a thread takes longer."""
        while arguments:
            super().process_request_thread(*arguments)
            self.free_threads.release()
            arguments = self.accepted.get()
        self.accepted.put(())  # The tuple is queued again for the next thread.

    def close_request(self, request):
        """Close a connection, which is the last that the base class does with it."""
        self.connections.discard(request)
        with self.lock:
            self.idle_since.pop(request, None)
        super().close_request(request)

    def handle_error(self, request, client_address):
        """Print the traceback of a bug, but nothing for an OSError: a disconnect."""
        if not isinstance(sys.exc_info()[1], OSError):
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed.
                super().handle_error(request, client_address)

    def server_close(self):
        """Stop listening, wait for the last responses, and end the threads."""
        super().server_close()
        for connection in self.connections.copy():
            with contextlib.suppress(OSError):  # The client has disconnected already.
                connection.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + self.shutdown_timeout
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        self.accepted.put(())  # Each waiting thread puts the tuple back and ends.


# ---- Command line ------------------------------------------------------------
# main() connects the parts.


def parse_options(arguments):
    """Return the options; exits with status 2 if one of them, or $PORT, is invalid."""
    users = "".join(f"  user-id: {user}  {role}\n" for user, role in USERS.items())
    example = "  curl -H 'user-id: 2' http://localhost:3000/api/events"
    parser = argparse.ArgumentParser(
        description="eventbook: an event booking backend over HTTP",
        epilog=f"users:\n{users}\nexample:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, default = parser.add_argument, "default: %(default)s"
    port_help = "port to listen on, 0 for any free port (default: $PORT, or else 3000)"
    port = os.environ.get("PORT") or "3000"
    option("-p", "--port", type=int, default=port, help=port_help)
    option("--host", default="127.0.0.1", help=default)
    option("--log", metavar="FILE", default=DEFAULT_LOG, help=default)
    option("--version", action="version", version=f"eventbook {VERSION}")
    return parser.parse_args(arguments)


def open_store(log_path, printer, error_printer):
    """Return a Store with its observers; raises OSError if the log is not writable."""
    if log_path == DEFAULT_LOG:  # Other folders must exist: their name may be a typo.
        os.makedirs(os.path.dirname(DEFAULT_LOG), exist_ok=True)

    def confirm(_, booking):
        printer.say(f"📧 Booking confirmation email sent for booking {booking.id}")

    def notify(_, customers):
        for customer in customers:
            printer.say(f"🔔 Event update notification sent to customer {customer}")

    store, log = Store(), Log(log_path, error_printer.say)
    store.on("booking.created", log, confirm)
    store.on("booking.cancelled", log)
    store.on("event.updated", notify)
    return store


def pin_to_one_cpu():
    """Keep the process on one CPU: passing Python's lock between CPUs is slow."""
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        with contextlib.suppress(AttributeError, OSError):  # not Linux; not permitted
            cpus = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})


def install_signal_handlers():
    """Have SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has no SIGHUP; nohup ignores it.
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)

    def stop(_number, _frame):
        # Further signals are ignored, but a second Ctrl-C ends the program at once.
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, stop)


def main(arguments=None):
    options = parse_options(arguments)
    host, port = options.host or "127.0.0.1", options.port
    printer, error_printer = Printer(sys.stdout), Printer(sys.stderr)
    try:
        store = open_store(options.log, printer, error_printer)
    except OSError as error:
        sys.exit(f"eventbook: cannot write {options.log} ({error}); change --log")
    try:
        server = Server((host, port), store)
    except (OSError, OverflowError, TypeError) as error:
        problem = f"cannot listen on {host}:{port} ({error})"
        sys.exit(f"eventbook: {problem}; change --port or --host")
    pin_to_one_cpu()
    threading.stack_size(2 * 1024**2)  # Nested JSON crashes 3.13 with 1 MiB of stack.
    printer.start()
    error_printer.start()
    threading.Thread(target=server.serve_forever, args=[0.1], daemon=True).start()
    name = "localhost" if host == "127.0.0.1" else host
    name = f"[{name}]" if ":" in name else name
    port = server.server_address[1]
    with contextlib.suppress(KeyboardInterrupt):
        install_signal_handlers()
        printer.say(f"eventbook is listening on http://{name}:{port}")
        while True:  # until a signal raises KeyboardInterrupt
            time.sleep(0.5)
    server.shutdown()
    server.server_close()
    printer.close(timeout=1)
    error_printer.close(timeout=1)


if __name__ == "__main__":
    main()
