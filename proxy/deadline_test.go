package proxy

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// counted counts how often a deadline is set on the socket.
type counted struct {
	net.Conn
	reads, writes int
}

func (c *counted) SetReadDeadline(t time.Time) error {
	c.reads++
	return c.Conn.SetReadDeadline(t)
}

func (c *counted) SetWriteDeadline(t time.Time) error {
	c.writes++
	return c.Conn.SetWriteDeadline(t)
}

func piped(t *testing.T, test func(t *testing.T, c *conn, socket *counted, peer net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		socket := &counted{Conn: near}
		test(t, &conn{Conn: socket}, socket, far)
	})
}

// passes reads, and complains unless the deadline passes after so long.
func passes(t *testing.T, c *conn, after time.Duration) {
	t.Helper()
	start := time.Now()
	n, err := c.Read(make([]byte, 1))
	if took := time.Since(start); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || took != after {
		t.Errorf("Read: %d, %v after %v, want the deadline after %v", n, err, took, after)
	}
}

func after(d time.Duration) time.Time { return time.Now().Add(d) }

func TestReadDeadlines(t *testing.T) {
	t.Run("set", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			passes(t, c, 5*time.Second)
			passes(t, c, 0)
		})
	})
	t.Run("moved later", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			_ = c.SetReadDeadline(after(75 * time.Second))
			passes(t, c, 75*time.Second)
		})
	})
	t.Run("moved earlier", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(75 * time.Second))
			_ = c.SetReadDeadline(after(500 * time.Millisecond))
			passes(t, c, 500*time.Millisecond)
		})
	})
	t.Run("moved while a read waits", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			time.AfterFunc(time.Second, func() { _ = c.SetReadDeadline(after(time.Second)) })
			passes(t, c, 2*time.Second)
		})
	})
	t.Run("removed", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
			_ = c.SetReadDeadline(after(5 * time.Second))
			_ = c.SetReadDeadline(time.Time{})
			time.AfterFunc(time.Hour, func() { _, _ = peer.Write([]byte("x")) })
			if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("Read: %d, %v", n, err)
			}
		})
	})
	t.Run("interrupted", func(t *testing.T) {
		piped(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			time.AfterFunc(time.Second, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
			passes(t, c, time.Second)
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetReadDeadline(after(75 * time.Second))
			passes(t, c, 75*time.Second)
		})
	})
}

// A peer that reads nothing is given up at the deadline that is meant; one that reads slowly gets all of it.
func TestWriteDeadlines(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
		_ = c.SetWriteDeadline(after(10 * time.Second))
		_ = c.SetWriteDeadline(after(15 * time.Second))
		go func() {
			time.Sleep(12 * time.Second)
			_, _ = peer.Read(make([]byte, 2)) // half of it
		}()
		start := time.Now()
		n, err := c.Write([]byte("four"))
		if took := time.Since(start); n != 2 || !errors.Is(err, os.ErrDeadlineExceeded) || took != 15*time.Second {
			t.Errorf("Write: %d, %v after %v, want half of it and the deadline after 15s", n, err, took)
		}
	})
}

// What net/http does with the deadlines of a connection that is kept alive touches the socket for the interruption alone.
func TestDeadlinesAreCheap(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, socket *counted, peer net.Conn) {
		const requests = 100
		go func() {
			for range requests {
				time.Sleep(time.Millisecond)
				_, _ = peer.Write([]byte("x"))
			}
		}()
		for range requests {
			_ = c.SetReadDeadline(after(idleTimeout))
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetReadDeadline(after(readHeaderTimeout))
			_ = c.SetReadDeadline(time.Time{})
			_ = c.SetWriteDeadline(after(writeTimeout))
			_ = c.SetReadDeadline(interrupt())
			_ = c.SetReadDeadline(time.Time{})
		}
		if socket.reads > 2*requests || socket.writes != 0 {
			t.Errorf("%d requests set %d read and %d write deadlines", requests, socket.reads, socket.writes)
		}
	})
}

// A connection that is closed is looked after no more, whatever is set then.
func TestDeadlinesEnd(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, socket *counted, _ net.Conn) {
		_ = c.SetReadDeadline(after(time.Second))
		_ = c.Close()
		_ = c.SetWriteDeadline(after(time.Second))
		time.Sleep(time.Minute)
		if socket.reads+socket.writes != 0 || c.deadlines.timer != nil {
			t.Error("a timer still runs")
		}
	})
}
