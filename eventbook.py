"""eventbook: an event booking backend over HTTP, in one file, standard library only.

    python eventbook.py                    # http://localhost:3000; Ctrl-C stops it
    curl -H 'user-id: 2' http://localhost:3000/api/events

Organizers create and update events, customers list them, book tickets and cancel. The
state is in memory: each run starts without events and with id 1. Bookings and
cancellations are appended to a log, which is not read again. The second half of the
file is about HTTP, because http.server alone accepts malformed requests and waits for
slow clients without a limit.

    event      Event(1, "Tech Conference 2026", "2026-02-15", 3)
    booking    Booking(1, 1, 2): booking 1 is one ticket of event 1 for customer 2
    request    Request("POST", "/api/events/1/book", "", {"user-id": "2"}, b"", 1, 2)
    operation  Store.book(store, request): what a route calls
    response   Response(404, b'{"error":"Not found"}', {}): status, body, headers
    error      HTTPError(404, "Not found"): an exception that holds a response

The path of a request: Server accepts a connection and gives it a thread; Handler parses
the request and reads the body; dispatch() finds the route and checks the role;
Store.perform() calls the operation; Handler sends the response.

1. State changes only inside Store.perform(), which holds the lock. A booking or a
   cancellation is in the log before the state changes.
2. The code from rules to routes does not know about connections. The code from request
   parsing to the server does not know about events, bookings and roles.
3. Only the thread of a connection reads and writes. Other threads can shut it down.
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
import traceback
import urllib.parse
from collections import OrderedDict, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = "1.0.0"
FOLDER = os.path.dirname(os.path.realpath(__file__))
DEFAULT_LOG = os.path.join(FOLDER, "logs", "events.log.jsonl")

# ---- Responses ---------------------------------------------------------------
# A request ends with a Response, or with an HTTPError that holds one.

Response = namedtuple("Response", "status body headers")
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(data):
    """Return a line of JSON as bytes; raises ValueError if that is impossible."""
    return ENCODER.encode(data).encode() + b"\n"


class HTTPError(Exception):
    """Ends the processing of a request; `response` is what the client gets."""

    def __init__(self, status, error, headers=None, **members):
        body = encode({"error": error, **members})
        self.response = Response(status, body, headers or {})


def require(condition, status, error, headers=None, **members):
    """Raise HTTPError unless the condition is true."""
    if not condition:
        raise HTTPError(status, error, headers, **members)


# ---- Records and rules -------------------------------------------------------
# Records are immutable: an update replaces one. Rules say which values are valid.

ORGANIZER, CUSTOMER = "ORGANIZER", "CUSTOMER"
USERS = {"1": ORGANIZER, "2": CUSTOMER, "3": CUSTOMER}  # user-id -> role


class Record:
    """Adds to a namedtuple its representation as JSON."""

    @functools.cached_property  # Lists encode each record only once.
    def json_text(self):
        return ENCODER.encode(self._asdict())


class Event(Record, namedtuple("Event", "id title date availableTickets")):
    @property
    def etag(self):
        """The entity tag. It changes with the content, and from run to run."""
        return f'"{hash(self) % 2**64:x}"'


class Booking(Record, namedtuple("Booking", "id eventId customerId")):
    pass


def paginate(records, offset=0, limit=None):
    """Return a Response with the records from offset on, at most limit of them."""
    end = len(records) if limit is None else offset + limit
    page = [record.json_text for record in records[offset:end]]
    body = f"[{','.join(page)}]\n".encode()
    return Response(200, body, {"X-Total-Count": len(records)})


TIME = r"([01]\d|2[0-3]):[0-5]\d"
SECONDS = r":[0-5]\d(\.\d{1,9})?"
DATE = re.compile(rf"\d{{4}}-\d\d-\d\d(T{TIME}({SECONDS})?(Z|[+-]{TIME})?)?", re.ASCII)


def is_title(value):
    return isinstance(value, str) and len(value) <= 200 and bool(value.strip())


def is_date(value):
    try:
        # The pattern is checked too: what fromisoformat() accepts varies by version.
        return bool(DATE.fullmatch(value) and date.fromisoformat(value[:10]))
    except (TypeError, ValueError):
        return False


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
# 0 stops the sale until tickets are added or a booking is cancelled.
UPDATE_RULES = {**CREATE_RULES, "availableTickets": integer(0, 10**9)}
PAGE_RULES = {"limit": integer(1, 1000), "offset": integer(0)}
FLAG = Rule(lambda value: value in ("true", "false"), "must be true or false")
EVENT_LIST_RULES = {**PAGE_RULES, "available": FLAG}
VISIBLE_ASCII = re.compile("[!-~]{1,255}")
KEY = Rule(VISIBLE_ASCII.fullmatch, "must be 1 to 255 visible ASCII characters")
KEY_RULES = {"Idempotency-Key": KEY}
UNKNOWN_FIELD = Rule(lambda value: False, "unknown field")


def validate(values, rules):
    """Raise HTTPError (400) if a value breaks its rule or has no rule."""
    details = {}
    for name, value in values.items():
        rule = rules.get(name, UNKNOWN_FIELD)
        if not rule.is_valid(value):
            details[name] = rule.description
    require(not details, 400, "Validation failed", details=details)


# ---- Requests ----------------------------------------------------------------
# What an operation can ask of a request.

NUMBER = re.compile("[0-9]{1,600}")  # int() may refuse more than 640 digits.


class Request(namedtuple("Request", "method path query headers body id user")):
    """What an operation gets. Header names are lower-case; id and user can be None."""

    def json(self):
        """Return the body as a dict, {} if it is empty; raises HTTPError (400)."""
        try:
            text = self.body.decode().lstrip("\ufeff")  # \ufeff is a byte order mark.
            # Deep nesting would crash Python 3.13 instead of raising an exception.
            brackets = text.count("[") + text.count("{")
            require(brackets <= 1000, 400, "JSON has more than 1,000 brackets")
            value = json.loads(text or "{}")
            encode(value)  # encode() rejects NaN, 1e400 and lone surrogates.
        except json.JSONDecodeError as error:
            raise HTTPError(400, f"Invalid JSON: {error}") from None
        except (ValueError, RecursionError):
            reason = "not UTF-8, nested too deeply, or an invalid number or character"
            raise HTTPError(400, f"Invalid JSON: {reason}") from None
        require(isinstance(value, dict), 400, "The JSON body must be an object")
        return value

    def parameters(self, rules):
        """Return the query parameters that have a rule; raises HTTPError (400)."""
        given = urllib.parse.parse_qs(self.query, keep_blank_values=True)
        # The values of a repeated parameter are joined, so that they break its rule.
        texts = {name: ", ".join(given[name]) for name in rules if name in given}
        values = {k: int(v) if NUMBER.fullmatch(v) else v for k, v in texts.items()}
        validate(values, rules)
        return values

    def check_preconditions(self, etag):
        """Raise HTTPError (412 or 304) if If-Match or If-None-Match is not met."""
        if "if-match" in self.headers:
            tags = split_list(self.headers["if-match"])
            matches = tags == ["*"] or etag in tags  # A weak tag, W/"1", never matches.
            require(matches, 412, "Event has changed", {"ETag": etag})
        if "if-none-match" in self.headers:
            tags = split_list(self.headers["if-none-match"])
            matches = tags == ["*"] or etag in tags or f"W/{etag}" in tags
            status = 412 if self.method == "PUT" else 304  # RFC 9110, 13.1.2
            require(not matches, status, "Event matches If-None-Match", {"ETag": etag})


def split_list(value):
    """Return the elements of a comma-separated header (RFC 9110, 5.6.1)."""
    return [element.strip(" \t") for element in value.split(",")]


# ---- Observers ---------------------------------------------------------------
# Store is an Observable: it calls its observers before a change. An observer that
# raises an exception prevents the change. Log is the first observer of bookings. The
# others, in open_store(), print notifications by means of a Printer.


class Observable:
    """Calls the functions that are registered for a name, such as booking.created."""

    def __init__(self):
        self.observers = defaultdict(list)

    def on(self, name, *observers):
        """Register functions, which emit(name, data) calls as observer(name, data)."""
        self.observers[name] += observers

    def emit(self, name, data):
        for observer in self.observers[name].copy():  # An observer may change the list.
            observer(name, data)


class Log:
    """A JSON Lines file. Its lines survive kill -9, but not a power failure."""

    def __init__(self, path, report):
        """Create the file, or terminate its last line; raises OSError."""
        self.path, self.report, self.failing = path, report, False
        with open(path, "a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # A crash left an incomplete line.
                file.write(b"\n")

    def __call__(self, name, booking):
        """Append a line. On failure, remove what was written, and raise HTTPError."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        timestamp, data = now.replace("+00:00", "Z"), booking._asdict()
        line = encode({"event": name, "timestamp": timestamp, "data": data})
        try:
            # The file is opened for each line, because it may be renamed or removed.
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(line)
                if written < len(line):
                    file.truncate(file.tell() - written)
                    raise OSError("only a part of the line was written")
            self.failing = False
        except OSError as error:
            if not self.failing:  # A log outage is reported once, not per request.
                self.report(f"eventbook: cannot write the log: {error}")
            self.failing = True
            headers = {"Retry-After": "5"}
            raise HTTPError(503, "The log cannot be written", headers) from None


class Printer(threading.Thread):
    """Prints lines in the background, in order, so that no request waits for it."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.lines = stream, queue.SimpleQueue()
        with contextlib.suppress(AttributeError, ValueError):  # no file, or closed
            stream.reconfigure(errors="replace")  # Not every console can show emoji.

    def say(self, line):
        """Queue a line, or drop it if 100,000 are waiting; never blocks or fails."""
        if self.lines.qsize() < 100_000:
            self.lines.put(line)

    def run(self):
        for line in iter(self.lines.get, None):  # close() queues None.
            # There may be no stream, or nobody who reads it.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                self.stream.write(f"{line}\n")
                self.stream.flush()

    def close(self, timeout):
        """End the thread once all lines are printed; wait at most `timeout` seconds."""
        self.lines.put(None)
        self.join(timeout)


# ---- Store -------------------------------------------------------------------
# The state, and the operations on it, whose docstrings are shown by GET /.


class Store(Observable):
    """Events and bookings in memory. An operation returns a record or a Response."""

    def __init__(self):
        super().__init__()
        # perform() holds the lock from a check to the change that depends on it, and
        # while observers run, so that log lines are in order. So an observer must not
        # call perform().
        self.lock = threading.Lock()
        self.last_booking = 0  # id of the latest booking
        self.events = {}  # event id -> Event
        self.bookings = {}  # booking id -> Booking, without the cancelled ones
        self.by_event = defaultdict(dict)  # event id -> {booking id: Booking}
        self.by_customer = defaultdict(dict)  # customer id -> {booking id: Booking}
        self.by_key = OrderedDict()  # (user id, Idempotency-Key) -> (hash, record)
        # The query and the Response of the last list_events(). _put() empties it.
        self.list_cache = None, None

    def perform(self, operation, request):
        """Return the result of an operation; the only method that takes the lock."""
        with self.lock:
            if request.method == "POST" and "idempotency-key" in request.headers:
                return self._perform_once(operation, request)
            return operation(self, request)

    def _perform_once(self, operation, request):
        """Return the first result for an Idempotency-Key, or raise HTTPError."""
        key = request.headers["idempotency-key"]
        validate({"Idempotency-Key": key}, KEY_RULES)
        content = hash((request.path, request.body))  # 10,000 bodies would be large.
        if (request.user, key) in self.by_key:
            first, result = self.by_key[request.user, key]
            require(content == first, 422, "Idempotency-Key of another request")
            return result
        result = operation(self, request)  # After an exception the key can be reused.
        self.by_key[request.user, key] = content, result
        if len(self.by_key) > 10_000:
            self.by_key.popitem(last=False)
        return result

    def create(self, request):
        """Create an event; an Idempotency-Key makes retries safe."""
        body = request.json()
        # Unknown fields are ignored: if one is misspelt, a required one is missing.
        values = {name: body.get(name) for name in CREATE_RULES}
        validate(values, CREATE_RULES)
        id = len(self.events) + 1  # Events are never deleted.
        return self._put(Event(id, **values))

    def update(self, request):
        """Update an event and notify the customers who have booked it."""
        values = request.json()
        event = self._find(request)
        request.check_preconditions(event.etag)
        # Unknown fields are errors: ignoring a misspelt one would lose the edit. An id
        # is valid if it is the same, so that a client can PUT what it got.
        validate(values, {**UPDATE_RULES, "id": integer(event.id, event.id)})
        # Each customer is notified once, even if the update changes nothing.
        customers = [b.customerId for b in self.by_event[event.id].values()]
        self.emit("event.updated", dict.fromkeys(customers))  # without duplicates
        return self._put(event._replace(**values))

    def book(self, request):
        """Book one ticket; an Idempotency-Key makes retries safe."""
        event = self._find(request)
        require(event.availableTickets > 0, 400, "Booking failed: sold out")
        booking = Booking(self.last_booking + 1, event.id, request.user)
        self.emit("booking.created", booking)
        self.last_booking = booking.id
        self.bookings[booking.id] = booking
        self.by_event[event.id][booking.id] = booking
        self.by_customer[request.user][booking.id] = booking
        self._put(event._replace(availableTickets=event.availableTickets - 1))
        return booking

    def cancel(self, request):
        """Cancel your booking and release its ticket."""
        booking = self.read_booking(request)
        self.emit("booking.cancelled", booking)
        del self.bookings[booking.id]
        del self.by_event[booking.eventId][booking.id]
        del self.by_customer[booking.customerId][booking.id]
        event = self.events[booking.eventId]
        self._put(event._replace(availableTickets=event.availableTickets + 1))
        return booking

    def read_event(self, request):
        """Get an event."""
        event = self._find(request)
        request.check_preconditions(event.etag)
        return event

    def read_booking(self, request):
        """Get your booking."""
        booking = self.bookings.get(request.id)
        require(booking, 404, "Booking not found")
        require(booking.customerId == request.user, 403, "Access denied")
        return booking

    def list_events(self, request):
        """List events; ?available=true omits those that are sold out."""
        if self.list_cache[0] != request.query:
            page = request.parameters(EVENT_LIST_RULES)
            events = list(self.events.values())
            if page.pop("available", "false") == "true":
                events = [event for event in events if event.availableTickets > 0]
            self.list_cache = request.query, paginate(events, **page)
        return self.list_cache[1]

    def list_bookings(self, request):
        """List the live bookings of an event."""
        bookings = self.by_event[self._find(request).id]
        return paginate([*bookings.values()], **request.parameters(PAGE_RULES))

    def list_own_bookings(self, request):
        """List your live bookings."""
        bookings = self.by_customer[request.user]
        return paginate([*bookings.values()], **request.parameters(PAGE_RULES))

    def _find(self, request):
        require(request.id in self.events, 404, "Event not found")
        return self.events[request.id]

    def _put(self, event):
        self.list_cache = None, None
        self.events[event.id] = event
        return event


# ---- Routes ------------------------------------------------------------------
# One table says which roles may call which operation.


def describe(_store, _request):
    """Describe this service and its routes."""
    routes = [{**r._asdict(), "operation": r.operation.__doc__} for r in ROUTES]
    data = {"service": "eventbook", "version": VERSION, "routes": routes}
    return Response(200, encode(data), {})


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
    Route("GET", "/", [], describe, None),  # needs no user-id
]


@functools.lru_cache  # Clients repeat requests, so results are cached.
def find_route(method, path):
    """Return (Route, id in the path or None); raises HTTPError (404, 405)."""
    found = {}  # method -> (Route, id)
    for route in ROUTES:
        # The path /api/events/:id matches /api/events/7 and /api/events/7/.
        pattern = route.path.rstrip("/").replace(":id", f"({NUMBER.pattern})") + "/?"
        match = re.fullmatch(pattern, path)
        if match:
            id = int(match[1]) if ":id" in route.path else None
            found[route.method] = route, id
    require(found, 404, "Not found")
    if "GET" in found:
        found["HEAD"] = found["GET"]
    require(method in found, 405, "Method not allowed", {"Allow": ", ".join(found)})
    return found[method]


def authorize(route, user_id):
    """Return the user id, or None if no user is needed; raises HTTPError (401, 403)."""
    if not route.roles:
        return None
    require(user_id in USERS, 401, "Unauthorized", {"WWW-Authenticate": "user-id"})
    require(USERS[user_id] in route.roles, 403, "Access denied")
    return int(user_id)


def dispatch(store, method, path, query, headers, body):
    """Perform a request and return the Response; raises HTTPError."""
    route, id = find_route(method, path)
    user = authorize(route, headers.get("user-id"))
    request = Request(method, path, query, headers, body, id, user)
    result = store.perform(route.operation, request)
    return result if isinstance(result, Response) else present(result, route)


def present(record, route):
    """Return the Response that shows an Event or a Booking."""
    name = "event" if isinstance(record, Event) else "booking"
    headers = {"ETag": record.etag} if name == "event" else {}
    data = record._asdict()
    if route.message:
        data = {"message": route.message, name: data}
    if route.method == "POST":
        headers["Location"] = f"/api/{name}s/{record.id}"
    return Response(201 if route.method == "POST" else 200, encode(data), headers)


# ---- Request parsing ---------------------------------------------------------
# http.server parses headers with the e-mail parser, which accepts folded lines, bare
# line feeds and two lengths. Two servers can then disagree on where a request ends,
# which enables request smuggling. So one pattern must match the request line, and
# another one the headers (RFC 9112, sections 2 to 7).

REQUEST_LINE_LIMIT = 8 * 1024 + len("\r\n")  # bytes; nginx's default
HEADERS_LIMIT = 16 * 1024 + len("\r\n")  # bytes with the empty line; Node.js's default
BODY_LIMIT = 64 * 1024  # bytes

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TARGET = '[!"$-~]+'  # visible ASCII without "#"
REQUEST_LINE = re.compile(f"({TOKEN}) ({TARGET}) (HTTP/[1-9][.][0-9])\r\n")
HEADERS = re.compile(f"({TOKEN}:[\t -~\x80-\xff]*\r\n)*\r\n")
REG_NAME = "([0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"
IPV6 = r"\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]"
AUTHORITY = rf"({REG_NAME}|{IPV6})(:[0-9]{{0,5}})?"  # such as localhost:3000
ABSOLUTE_FORM = re.compile(rf"^(?i:https?)://{AUTHORITY}(/|(?=\?|$))")


@functools.lru_cache  # Request lines repeat, so parsed ones are cached.
def parse_request_line(line):
    """Return (method, path, query, version); raises HTTPError (400, 414, 505)."""
    require(len(line) <= REQUEST_LINE_LIMIT, 414, "Request line too long")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    require(match, 400, "Malformed request line")
    method, target, version = match.groups()
    require(version in ("HTTP/1.0", "HTTP/1.1"), 505, "Use HTTP/1.0 or HTTP/1.1")
    path, _, query = ABSOLUTE_FORM.sub("/", target).partition("?")
    is_valid = path.startswith("/") or (method, target) == ("OPTIONS", "*")
    require(is_valid, 400, "Invalid request target")
    return method, path, query, version


def read_header_lines(file):
    """Read up to an empty line, the end of input, or more than HEADERS_LIMIT."""
    line, lines = None, bytearray()
    while line not in (b"\r\n", b"\n", b"") and len(lines) <= HEADERS_LIMIT:
        line = file.readline(HEADERS_LIMIT + 1)
        lines += line
    return bytes(lines)


@functools.lru_cache  # The dict is cached, too: do not change it.
def parse_headers(lines, version):
    """Return (headers, body length, keep alive?, expects 100?); raises HTTPError."""
    require(len(lines) <= HEADERS_LIMIT, 431, "Headers too large")
    text = lines.decode("latin-1")
    require(HEADERS.fullmatch(text), 400, "Malformed or incomplete header line")
    values = defaultdict(list)
    for line in text.split("\r\n")[:-2]:
        name, _, value = line.partition(":")
        values[name.lower()].append(value.strip(" \t"))
    # Repeated headers are joined by ", ". Where that is not valid, as in Host, a header
    # that is repeated is therefore rejected.
    headers = {name: ", ".join(parts) for name, parts in values.items()}
    is_1_1 = version == "HTTP/1.1"
    if is_1_1 or headers.get("host"):  # HTTP/1.0 needs no Host.
        is_host = re.fullmatch(AUTHORITY, headers.get("host", ""))
        require(is_host, 400, "Exactly one valid Host is required")
    options = split_list(headers.get("connection", "").lower())
    keep_alive = is_1_1 and "close" not in options
    expects_100 = is_1_1 and headers.get("expect", "").lower() == "100-continue"
    return headers, body_length(headers), keep_alive, expects_100


def body_length(headers):
    """Return the length of a body (RFC 9112, 6.3); raises HTTPError (400, 411, 413)."""
    length = headers.get("content-length", "0")
    require(re.fullmatch("[0-9]+", length), 400, "Invalid Content-Length")
    # A request with both Transfer-Encoding and Content-Length may be an attack.
    status = 400 if "content-length" in headers else 411
    require("transfer-encoding" not in headers, status, "Transfer-Encoding unsupported")
    digits = length.lstrip("0") or "0"
    fits = len(digits) <= 5 and int(digits) <= BODY_LIMIT
    require(fits, 413, "Body too large")
    return int(digits)


# ---- Connections -------------------------------------------------------------
# Which connections are open, and which of them are too slow.


class Connections:
    """The open connections, and since when the server has waited for their clients.

    A connection is busy while a request of it is performed; Handler.respond() says so.
    Then its client has max_wait seconds in all to read the response and to send the
    next complete request. A client that takes longer is dropped: no further request of
    it is performed, and its connection is shut down, so that its thread closes it (on
    Windows, where this wakes no recv(), only when the client sends or closes).
    """

    max_wait = 16  # seconds
    max_wait_if_full = 1  # seconds

    def __init__(self, clock=time.monotonic):
        self.clock, self.lock = clock, threading.Lock()
        self.waiting_since = {}  # connection -> time, or infinity while it is busy
        self.limit = 512  # connections, as in an nginx worker
        files = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
        if files > 0:  # 24 descriptors are reserved: log, console, closing connections.
            self.limit = max(8, min(self.limit, files - 24))

    def is_full(self):
        return len(self.waiting_since) >= self.limit

    def set_waiting(self, connection):
        """Add a connection, or note that it is no longer busy."""
        with self.lock:
            self.waiting_since[connection] = self.clock()

    def set_busy(self, connection):
        """Keep a connection from being dropped; raises OSError if it was dropped."""
        with self.lock:
            if connection not in self.waiting_since:
                raise ConnectionAbortedError("the server has dropped the connection")
            self.waiting_since[connection] = math.inf

    def remove(self, connection):
        with self.lock:
            self.waiting_since.pop(connection, None)

    def drop_slow(self):
        """Drop the clients that are too slow, starting with the slowest."""
        with self.lock:
            while self.waiting_since:
                slowest = min(self.waiting_since, key=self.waiting_since.get)
                max_wait = self.max_wait_if_full if self.is_full() else self.max_wait
                waited = self.clock() - self.waiting_since[slowest]  # < 0 if it is busy
                if waited < max_wait:
                    break
                del self.waiting_since[slowest]
                shut_down(slowest, socket.SHUT_RDWR)

    def stop(self, seconds):
        """Wait until what has arrived is answered, then drop the rest."""
        with self.lock:
            for connection in self.waiting_since:
                # Its thread reads what has arrived, then the end of input, and closes.
                shut_down(connection, socket.SHUT_RD)
        deadline = time.monotonic() + seconds
        while self.waiting_since and time.monotonic() < deadline:
            if time.monotonic() > deadline - seconds / 2:
                self.limit = 0  # From now on, each response closes its connection.
            time.sleep(0.01)
        with self.lock:
            for connection in self.waiting_since:
                shut_down(connection, socket.SHUT_RDWR)
            self.waiting_since.clear()


def shut_down(connection, how):
    with contextlib.suppress(OSError):  # The client has disconnected already.
        connection.shutdown(how)


# ---- Server ------------------------------------------------------------------
# Handler reads and writes without a timeout, because Server drops slow clients.

http_date = functools.lru_cache(maxsize=1)(email.utils.formatdate)  # once a second


class Handler(BaseHTTPRequestHandler):
    """Serves one connection. The base class calls

    handle()                      which calls, until close_connection is true,
      handle_one_request()        which reads the request line, and calls
        parse_request()           and then
        do_GET(), do_PUT(), ...   which are all respond(); or for another method
        send_error()
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm delays a pipelined response.

    def handle_one_request(self):
        """Serve one request; turn an HTTPError or a bug into a response."""
        self.close_connection = True  # unless respond() keeps it open
        self.command = None  # so that send() does not see that of the last request
        try:
            super().handle_one_request()
        except HTTPError as error:
            self.send(error.response)
        except Exception:  # a bug, or a disconnect: then send() raises OSError as well
            self.server.handle_error(self.connection, self.client_address)
            self.send(HTTPError(500, "Internal server error").response)

    def parse_request(self):
        """Parse the request line and the headers; return False if there is none."""
        if self.raw_requestline == b"\r\n":  # An empty line is skipped: RFC 9112, 2.2.
            self.raw_requestline = self.rfile.readline(REQUEST_LINE_LIMIT + 1)
            if not self.raw_requestline:
                return False
        parsed = parse_request_line(self.raw_requestline)
        self.command, self.path, self.query, self.request_version = parsed
        parsed = parse_headers(read_header_lines(self.rfile), self.request_version)
        self.headers, self.length, self.keep_alive, self.expects_100 = parsed
        return True

    def respond(self):
        """Read the body, perform the request and send the response."""
        if self.expects_100:
            self.handle_expect_100()
        body = self.rfile.read(self.length)
        require(len(body) == self.length, 400, "Incomplete body")
        parts = self.command, self.path, self.query, self.headers, body
        self.server.connections.set_busy(self.connection)
        # From here on the client is not dropped, and errors do not end the connection.
        self.close_connection = not self.keep_alive
        try:
            response = dispatch(self.server.store, *parts)
        finally:
            self.server.connections.set_waiting(self.connection)
        self.send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = respond
    do_CONNECT = do_OPTIONS = do_TRACE = respond

    def send_error(self, code, message=None, explain=None):
        """Raise HTTPError, for a 414 or 501; the base class would send a page."""
        raise HTTPError(code, self.responses[code][0])

    def send(self, response):
        """Send a response with one write(); send_header() would be slower."""
        status, body, headers = response
        if self.server.connections.is_full():
            self.close_connection = True  # This makes room for another client.
        lines = [
            f"{self.protocol_version} {status} {self.responses[status][0]}",
            f"Date: {http_date(int(time.time()), usegmt=True)}",
            "Content-Type: application/json; charset=utf-8",
            "Cache-Control: no-cache",  # A cache may keep it, but must validate it.
            "X-Content-Type-Options: nosniff",
            *[f"{name}: {value}" for name, value in headers.items()],
        ]
        if self.close_connection:
            lines += ["Connection: close"]
        else:  # One second less than the limit, so that no client is a moment late.
            keep_alive = f"Keep-Alive: timeout={self.server.connections.max_wait - 1}"
            lines += ["Connection: keep-alive", keep_alive]
        if status != 304:
            lines += [f"Content-Length: {len(body)}"]
        if status == 304 or self.command == "HEAD":
            body = b""
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)

    def finish(self):
        """Wait for the client to close, or it may lose the response (RFC 9112, 9.6)."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(64 * 1024):
                pass

    def log_error(self, *arguments):
        """Do nothing; the base class would report a client whose network vanished."""


class Server(ThreadingHTTPServer):
    """Accepts connections and serves each in a thread. All methods are overrides.

    The threads come from a pool: the base class would start one for each connection,
    which takes longer than answering a request. When Connections.limit is reached, new
    clients wait in the queue of the system, each response closes its connection, and
    slow clients are dropped sooner.
    """

    allow_reuse_address = os.name == "posix"  # On Windows, SO_REUSEADDR shares a port.
    # HTTPServer.server_bind() makes a DNS lookup, which can take seconds.
    server_bind = socketserver.TCPServer.server_bind
    request_queue_size = 4096  # clients that wait to be accepted; Linux's default
    max_stop = 2  # seconds to answer the last requests when the server stops
    stopping = False  # A signal handler sets this.

    def __init__(self, address, store, report):
        """Listen on (host, port); raises OSError, OverflowError or UnicodeError."""
        self.store, self.report = store, report
        # If the bind fails, the base class calls server_close(), which needs these.
        self.connections = Connections()
        self.pool = ThreadPoolExecutor(10_000)  # as dropped connections can keep theirs
        host, port = address
        found = min(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        self.address_family, *_, sockaddr = found  # IPv4 comes before IPv6.
        super().__init__((sockaddr[0], port, *sockaddr[2:]), Handler)

    def get_request(self):
        """Accept a connection, or raise OSError: the base class then tries again."""
        try:
            if self.connections.is_full():
                raise OSError("too many connections")
            return super().get_request()
        except OSError:
            time.sleep(0.005)
            raise

    def process_request(self, request, client_address):
        """Have a thread of the pool serve a connection."""
        self.connections.set_waiting(request)
        # submit() queues the call before it starts a thread. If that fails, another
        # thread will take the call.
        with contextlib.suppress(RuntimeError):
            self.pool.submit(self.process_request_thread, request, client_address)

    def service_actions(self):
        """Drop slow clients, or stop; serve_forever() calls this regularly."""
        self.connections.drop_slow()
        if self.stopping:
            raise KeyboardInterrupt  # shutdown() would wait for this thread, for ever.

    def close_request(self, request):
        self.connections.remove(request)
        super().close_request(request)

    def handle_error(self, request, client_address):
        """Report the traceback of a bug, but no OSError, which means a disconnect."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.report(traceback.format_exc())

    def server_close(self):
        """Stop listening, wait for the last responses, and end the threads."""
        super().server_close()
        self.connections.stop(self.max_stop)
        self.pool.shutdown(wait=False)


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
    # argparse converts a default that is a string, so that $PORT is checked as well.
    port = os.environ.get("PORT") or "3000"
    option("-p", "--port", type=int, default=port, help=port_help)
    option("--host", default="127.0.0.1", help=default)
    option("--log", metavar="FILE", default=DEFAULT_LOG, help=default)
    option("--version", action="version", version=f"eventbook {VERSION}")
    return parser.parse_args(arguments)


def open_store(log_path, printer, report):
    """Return a Store with its observers; raises OSError if the log is not writable."""
    if log_path == DEFAULT_LOG:  # Other folders must exist: their name may be a typo.
        os.makedirs(os.path.dirname(DEFAULT_LOG), exist_ok=True)

    def confirm(_, booking):
        printer.say(f"📧 Booking confirmation email sent for booking {booking.id}")

    def notify(_, customers):
        for customer in customers:
            printer.say(f"🔔 Event update notification sent to customer {customer}")

    store, log = Store(), Log(log_path, report)
    store.on("booking.created", log, confirm)
    store.on("booking.cancelled", log)
    store.on("event.updated", notify)
    return store


def pin_to_one_cpu():
    """Keep the process on one CPU, which makes it up to twice as fast."""
    # Passing Python's lock to a thread on another CPU takes longer than most requests.
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        with contextlib.suppress(AttributeError, OSError):  # not Linux; not permitted
            cpus = sorted(os.sched_getaffinity(0))
            # The process id spreads several servers over the CPUs.
            os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})


def stop_on_signals(server):
    """Have Ctrl-C and SIGTERM stop the server, which answers its last requests."""

    def stop(_number, _frame):
        server.stopping = True  # An exception, raised here, could interrupt anything.
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Another Ctrl-C ends the process.

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def main(arguments=None):
    options = parse_options(arguments)
    host, port = options.host or "127.0.0.1", options.port
    printer, error_printer = Printer(sys.stdout), Printer(sys.stderr)
    try:
        store = open_store(options.log, printer, error_printer.say)
    except OSError as error:
        sys.exit(f"eventbook: cannot write {options.log} ({error}); change --log")
    try:
        server = Server((host, port), store, error_printer.say)
    except (OSError, OverflowError, UnicodeError) as error:
        problem = f"cannot listen on {host}:{port} ({error})"
        sys.exit(f"eventbook: {problem}; change --port or --host")
    pin_to_one_cpu()  # before there are threads, which inherit it
    threading.stack_size(1024**2)  # bytes; JSON with 1,000 brackets needs 256 KiB
    printer.start()
    error_printer.start()
    stop_on_signals(server)
    name = "localhost" if host == "127.0.0.1" else host
    name = f"[{name}]" if ":" in name else name
    printer.say(f"eventbook is listening on http://{name}:{server.server_address[1]}")
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    finally:
        deadline = time.monotonic() + server.max_stop + 0.5
        server.server_close()
        for each in printer, error_printer:
            each.close(timeout=deadline - time.monotonic())


if __name__ == "__main__":
    main()
    os._exit(0)  # Do not wait for threads that shut_down() has not woken.
