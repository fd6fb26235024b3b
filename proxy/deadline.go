package proxy

import (
	"errors"
	"os"
	"sync"
	"time"
)

// deadline is that of one direction of a connection. net/http moves it six times per request, and every time the runtime would
// change a timer, and often wake a thread for it: a tenth of what an answer costs. Here the socket keeps the earliest one. A
// deadline that is moved later or removed is only noted; should the socket's pass then, whoever it interrupts finds out that it
// was not meant, sets what was, and goes on. So it is exact, and costs something once in checkpoint only.
type deadline struct {
	mu     sync.Mutex
	meant  time.Time // zero: none
	socket time.Time // what the socket has, never later than meant; zero: none
	past   bool      // the socket's was set into the past, which is how net/http interrupts a read
}

// checkpoint is for how long what is set after an interruption holds off the next: until the head of a request would be late.
const checkpoint = readHeaderTimeout

// move sets t; set does so on the socket.
func (d *deadline) move(t time.Time, set func(time.Time) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.meant = t
	if t.IsZero() || !d.socket.IsZero() && !t.Before(d.socket) {
		return nil
	}
	d.socket, d.past = t, t.Equal(interrupt)
	return set(t)
}

// interrupt is the deadline with which net/http interrupts a read. Any other is set when it comes to it.
var interrupt = time.Unix(1, 0)

// early says whether err came of a deadline that was not meant, and sets the one that is.
func (d *deadline) early(err error, set func(time.Time) error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if !d.meant.IsZero() && !now.Before(d.meant) {
		return false
	}
	next := d.meant
	if soon := now.Add(checkpoint); d.past && (next.IsZero() || soon.Before(next)) {
		next = soon
	}
	d.socket, d.past = next, false
	return set(next) == nil
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.reads.move(t, c.Conn.SetReadDeadline) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.writes.move(t, c.Conn.SetWriteDeadline) }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// receive reads what comes until the deadline that is meant.
func (c *conn) receive(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if n > 0 || err == nil || !c.reads.early(err, c.Conn.SetReadDeadline) {
			return n, err
		}
	}
}

// send writes all of p by the deadline that is meant.
func (c *conn) send(p []byte) (n int, err error) {
	for {
		var m int
		m, err = c.Conn.Write(p[n:])
		if n += m; err == nil || !c.writes.early(err, c.Conn.SetWriteDeadline) {
			return n, err
		}
	}
}
