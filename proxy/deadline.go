package proxy

import (
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// deadlines are those of a connection. net/http moves them several times per request, and each time the runtime would change a
// timer, and often wake a thread for it. Here they are noted, and one timer, which no request touches, looks after them: it tells
// the socket of a deadline once it has passed. They are exact all the same, because the timer is never later than the earliest.
//
// Two are not net/http's, which would ask the clock for each at each answer, but what the timer sees to last too long: a wait for
// something to read, mostly the next request, and a write. It sees them begin up to look later than they do.
type deadlines struct {
	mu          sync.Mutex
	read, write deadline
	timer       *time.Timer // nil until there is something to look after
	next        time.Time   // when it fires
	closed      bool
	lookout     lookout

	state   atomic.Int32 // http.ConnState
	writes  atomic.Int64 // begun and ended ones: odd while one is under way
	waited  lasting      // since an answer, or a change of state
	written lasting
}

// lasting is what the timer saw, and since when it has been the same.
type lasting struct {
	what  int64
	since time.Time
}

// ends is when it will have been the same for d.
func (l *lasting) ends(what int64, now time.Time, d time.Duration) time.Time {
	if l.what != what || l.since.IsZero() {
		*l = lasting{what, now}
	}
	return l.since.Add(d)
}

// deadline is that of one direction.
type deadline struct {
	at   time.Time // zero: none
	told bool      // the socket has been told, and lets nothing pass
}

// look is how often the timer fires at least. A deadline that comes earlier than its next time moves it.
const look = readHeaderTimeout

// interrupt is how net/http ends a read of its own at once.
func interrupt() time.Time { return time.Unix(1, 0) }

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(&c.deadlines.read, t, c.Conn.SetReadDeadline)
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(&c.deadlines.write, t, c.Conn.SetWriteDeadline)
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) setDeadline(d *deadline, t time.Time, socket func(time.Time) error) (err error) {
	l := &c.deadlines
	l.mu.Lock()
	d.at = t
	switch {
	case d == &l.read && l.lookout.takes(t, l.state.Load()):
	case t.IsZero() && !d.told: // most of them
	case t.Equal(interrupt()):
		d.told, err = true, socket(t)
	default:
		if d.told {
			d.told, err = false, socket(time.Time{})
		}
		if !t.IsZero() && !l.closed && (l.timer == nil || t.Before(l.next)) {
			c.lookAt(time.Now(), t)
		}
	}
	l.mu.Unlock()
	return err
}

// lookAt sets the timer. The lock is held.
func (c *conn) lookAt(now, t time.Time) {
	l := &c.deadlines
	if latest := now.Add(look); t.After(latest) {
		t = latest
	}
	l.next = t
	if l.timer == nil {
		l.timer = time.AfterFunc(t.Sub(now), c.lookAfter)
	} else {
		l.timer.Reset(t.Sub(now))
	}
}

// lookAfter is what the timer does.
func (c *conn) lookAfter() {
	l := &c.deadlines
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	next := now.Add(look)
	read, write := l.read.at, l.write.at
	l.lookout.begin() // a request that takes so long
	// Also while net/http waits for the rest of a body that it has refused by itself.
	if state := l.state.Load(); read.IsZero() && state != int32(http.StateNew) {
		read = l.waited.ends(c.served.Load()+int64(state), now, idleTimeout)
	}
	if n := l.writes.Load(); write.IsZero() && n%2 == 1 {
		write = l.written.ends(n, now, writeTimeout)
	}
	for _, d := range []struct {
		*deadline
		at     time.Time
		socket func(time.Time) error
	}{{&l.read, read, c.Conn.SetReadDeadline}, {&l.write, write, c.Conn.SetWriteDeadline}} {
		switch {
		case d.told, d.at.IsZero():
		case d.at.After(now):
			next = earlier(next, d.at)
		default:
			d.told = true
			_ = d.socket(interrupt()) // fails when it is closed
		}
	}
	if !l.closed {
		c.lookAt(now, next)
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// stopDeadlines ends the timer.
func (c *conn) stopDeadlines() {
	c.deadlines.mu.Lock()
	defer c.deadlines.mu.Unlock()
	c.deadlines.closed = true
	c.deadlines.lookout.begin()
	if c.deadlines.timer != nil {
		c.deadlines.timer.Stop()
		c.deadlines.timer = nil
	}
}
