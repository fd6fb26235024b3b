package proxy

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// missingHost is inserted where a Host should have been.
const missingHost = "Host: " + MetadataIPv4 + "\r\n"

// maxHostHead is the longest head that is completed.
const maxHostHead = 16 << 10

// conn inserts a Host line into HTTP/1.1 heads that lack one. aws-c-auth until mid 2023, and every SDK that brings it
// along, sends such heads; the real endpoint serves them, net/http answers 400.
//
// Only what can be followed with certainty is touched: heads of GET, HEAD and PUT without a body. The first head that could
// be followed by a body, or that is anything else, switches the insertion off for the rest of the connection, because where
// the next head begins would then be a guess, and a wrong guess request smuggling. Bytes are passed on as they come, so
// that net/http's deadlines and limits see what they always see: the line goes before the empty line that ends the head.
type conn struct {
	net.Conn
	shares *shares       // nil: nobody counts it
	source *source       // with shares
	served atomic.Int64  // when it was last answered, or else accepted: Unix nanoseconds
	wait   time.Duration // before its next request is read, because its source has used up its time
	begun  bool          // something has been read
	shown  shown

	of      atomic.Pointer[Caller] // who was identified on it last; nil: nobody
	closing atomic.Bool

	deadlines deadlines

	accepted int64         // when; Unix nanoseconds
	perRead  time.Duration // what every read is charged, which then waits; 0: requests are charged instead

	off     bool
	inHead  bool   // the request line has been seen
	host    bool   // the head needs no Host, or has it
	wantLF  bool   // the carriage return of the empty line has been seen
	size    int    // of the head so far
	partial []byte // of a line whose end has not come; it has been passed on already
	ready   []byte // completed, not passed on yet
}

// Close may be called more than once.
func (c *conn) Close() error {
	if c.perRead > 0 || c.shares == nil {
		return c.end()
	}
	if c.closing.Swap(true) {
		return nil
	}
	if acknowledged(c.Conn) || c.CloseWrite() != nil { // or its peer has reset it: then nothing is under way
		return c.end()
	}
	go c.linger()
	return nil
}

func (c *conn) end() error {
	defer c.stopDeadlines()
	if c.shares != nil {
		defer c.shares.release(c)
	}
	return c.Conn.Close()
}

// CloseWrite is what net/http uses so that a last answer is not lost in a reset.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// unreadable is how the head goes on, after its first line, of every answer that net/http gives by itself to a request
// that it cannot read. It has no Content-Length, without which old CRTs abort the process.
const unreadable = "\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"

func (c *conn) Write(p []byte) (int, error) {
	first := bytes.IndexByte(p, '\r')
	if c.perRead > 0 || first < 0 || !bytes.HasPrefix(p, []byte("HTTP/1.")) || !bytes.HasPrefix(p[first:], []byte(unreadable)) {
		return c.send(p)
	}
	body := p[first+len(unreadable):]
	full := fmt.Appendf(nil, "%s\r\nServer: EC2ws\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		p[:first], len(body), body)
	if _, err := c.send(full); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *conn) send(p []byte) (int, error) {
	c.deadlines.writes.Add(1)
	defer c.deadlines.writes.Add(1)
	return c.Conn.Write(p)
}

func (c *conn) Read(p []byte) (int, error) {
	if !c.begun {
		c.begun = true
		time.Sleep(c.wait) // as connState does later on
	}
	if c.perRead > 0 {
		time.Sleep(c.source.charge(time.Now(), c.perRead))
	}
	if len(p) == 1 && !c.deadlines.awaitLookout() {
		return 0, os.ErrDeadlineExceeded
	}
	if len(c.ready) == 0 {
		c.ready = nil
		n, err := c.Conn.Read(p)
		if n == 0 || c.off {
			return n, err
		}
		at := c.scan(p[:n])
		if at < 0 {
			return n, err
		}
		c.ready = c.complete(p[at:n])
		if at > 0 {
			return at, nil // an error comes again with the next read
		}
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

// complete copies b, whose first byte is where a Host is missing.
func (c *conn) complete(b []byte) []byte {
	out := make([]byte, 0, len(b)+2*len(missingHost))
	for at := 0; at >= 0; at = c.scan(b) {
		out = append(append(out, b[:at]...), missingHost...)
		b = b[at:]
		c.host = true
	}
	return append(out, b...)
}

// scan follows b and returns where a Host has to be inserted; scanning has to go on from there. It returns -1 at the end.
func (c *conn) scan(b []byte) int {
	for i := 0; i < len(b) && !c.off; {
		if c.wantLF || c.inHead && len(c.partial) == 0 && (b[i] == '\r' || b[i] == '\n') {
			switch {
			case !c.host:
				return i
			case b[i] == '\r' && !c.wantLF:
				c.wantLF = true
			case b[i] == '\n':
				c.inHead, c.wantLF, c.size = false, false, 0
			default:
				c.off = true
			}
			i++
			continue
		}
		end := bytes.IndexByte(b[i:], '\n')
		if end < 0 {
			c.grow(len(b) - i)
			if !c.off {
				c.partial = append(c.partial, b[i:]...)
			}
			return -1
		}
		c.grow(end + 1)
		line := b[i : i+end]
		if len(c.partial) > 0 {
			line = append(c.partial, line...)
			c.partial = nil
		}
		c.line(bytes.TrimSuffix(line, []byte("\r")))
		i += end + 1
	}
	return -1
}

func (c *conn) grow(n int) {
	if c.size += n; c.size > maxHostHead {
		c.off, c.partial = true, nil
	}
}

// line follows one line of a head, read as net/http does: it ends with a line feed, and one carriage return before that is
// dropped.
func (c *conn) line(line []byte) {
	if !c.inHead {
		method, rest, _ := bytes.Cut(line, []byte(" "))
		_, proto, _ := bytes.Cut(rest, []byte(" "))
		switch string(method) {
		case "GET", "HEAD", "PUT":
		default:
			c.off = true
		}
		switch string(proto) {
		case "HTTP/1.1":
			c.host = false
		case "HTTP/1.0":
			c.host = true
		default:
			c.off = true
		}
		c.inHead = true
		return
	}
	name, value, colon := bytes.Cut(line, []byte(":"))
	if !colon || len(name) == 0 || name[0] == ' ' || name[0] == '\t' {
		c.off = true // a continued line could be of a Content-Length
		return
	}
	switch len(name) {
	case len("Host"):
		c.host = c.host || strings.EqualFold(string(name), "Host")
	case len("Content-Length"):
		c.off = strings.EqualFold(string(name), "Content-Length") && string(bytes.Trim(value, " \t")) != "0"
	case len("Transfer-Encoding"):
		c.off = strings.EqualFold(string(name), "Transfer-Encoding")
	}
}
