package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// answering is a connection whose request is being answered, as net/http leaves it.
func answering(t *testing.T, test func(t *testing.T, c *conn, socket *counted, peer net.Conn)) {
	piped(t, func(t *testing.T, c *conn, socket *counted, peer net.Conn) {
		_ = c.SetReadDeadline(after(readHeaderTimeout))
		_ = c.SetReadDeadline(time.Time{})
		connState(c, http.StateActive)
		test(t, c, socket, peer)
	})
}

type readResult struct {
	n    int
	err  error
	took time.Duration
}

// lookingOut is a read of one byte that has begun.
func lookingOut(c *conn) <-chan readResult {
	got := make(chan readResult, 1)
	go func() {
		start := time.Now()
		n, err := c.Read(make([]byte, 1))
		got <- readResult{n, err, time.Since(start)}
	}()
	synctest.Wait()
	return got
}

func TestLookout(t *testing.T) {
	interrupted := func(t *testing.T, r readResult, after time.Duration) {
		t.Helper()
		if r.n != 0 || !errors.Is(r.err, os.ErrDeadlineExceeded) || r.took != after {
			t.Errorf("Read: %d, %v after %v, want the deadline after %v", r.n, r.err, r.took, after)
		}
	}
	read := func(t *testing.T, r readResult, after time.Duration) {
		t.Helper()
		if r.n != 1 || r.err != nil || r.took != after {
			t.Errorf("Read: %d, %v after %v, want a byte after %v", r.n, r.err, r.took, after)
		}
	}
	write := func(peer net.Conn) { go func() { _, _ = peer.Write([]byte("x")) }() }

	t.Run("answered from memory", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, socket *counted, peer net.Conn) {
			write(peer) // the next request, too early
			for range 3 {
				got := lookingOut(c)
				time.Sleep(time.Millisecond)
				_ = c.SetReadDeadline(interrupt())
				interrupted(t, <-got, time.Millisecond)
				_ = c.SetReadDeadline(time.Time{})
			}
			_ = c.SetReadDeadline(interrupt()) // answered before it has begun
			interrupted(t, <-lookingOut(c), 0)
			_ = c.SetReadDeadline(time.Time{})
			if socket.reads != 0 {
				t.Errorf("the socket's deadline was set %d times", socket.reads)
			}
			connState(c, http.StateIdle)
			read(t, <-lookingOut(c), 0) // nothing of it was lost
		})
	})
	t.Run("has to wait", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
			got := lookingOut(c)
			c.deadlines.beginLookout()
			c.deadlines.beginLookout()
			time.Sleep(time.Second)
			_ = c.SetReadDeadline(interrupt())
			interrupted(t, <-got, time.Second)
			_ = c.SetReadDeadline(time.Time{})
			c.deadlines.beginLookout() // before the goroutine has
			got = lookingOut(c)
			time.Sleep(time.Second)
			write(peer)
			read(t, <-got, time.Second)
		})
	})
	t.Run("each answer anew", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, socket *counted, _ net.Conn) {
			c.deadlines.beginLookout()
			_ = c.SetReadDeadline(interrupt())
			_ = c.SetReadDeadline(time.Time{})
			before := socket.reads
			got := lookingOut(c)
			_ = c.SetReadDeadline(interrupt())
			interrupted(t, <-got, 0)
			if socket.reads != before {
				t.Error("the socket was told")
			}
		})
	})
	t.Run("a body's deadline before it has begun", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			_ = c.SetReadDeadline(after(bodyTimeout)) // of an answer to who may send a body, but does not
			got := lookingOut(c)
			_ = c.SetReadDeadline(interrupt())
			interrupted(t, <-got, 0)
		})
	})
	t.Run("a body's deadline after it has begun", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			got := lookingOut(c)
			c.deadlines.beginLookout()
			synctest.Wait()
			_ = c.SetReadDeadline(after(bodyTimeout))
			_ = c.SetReadDeadline(interrupt())
			interrupted(t, <-got, 0)
		})
	})
	t.Run("takes long, although nothing was to wait for", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
			_ = peer.Close()
			if r := <-lookingOut(c); !errors.Is(r.err, io.EOF) || r.took > look {
				t.Errorf("Read: %d, %v after %v, want the end within %v", r.n, r.err, r.took, look)
			}
		})
	})
	t.Run("closed", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, _ net.Conn) {
			got := lookingOut(c)
			_ = c.Close()
			if r := <-got; r.n != 0 || r.err == nil || r.took != 0 {
				t.Errorf("Read: %d, %v after %v, want an error at once", r.n, r.err, r.took)
			}
		})
	})
	t.Run("a byte of a head", func(t *testing.T) {
		for _, state := range []http.ConnState{http.StateNew, http.StateIdle} {
			piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
				connState(c, state)
				write(peer)
				read(t, <-lookingOut(c), 0)
			})
		}
	})
	t.Run("a byte of a body", func(t *testing.T) {
		answering(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
			_ = c.SetReadDeadline(after(bodyTimeout))
			write(peer)
			read(t, <-lookingOut(c), 0)
		})
	})
}

// The real net/http never tells the socket of a deadline, and reads it for what is sent alone, as long as answers come from memory.
func TestNoLookoutFromMemory(t *testing.T) {
	const answers = 20
	socket := servePipe(t, nobody, func(peer net.Conn, br *bufio.Reader) {
		for range answers {
			go func() { _, _ = io.WriteString(peer, "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n") }()
			if r, err := readReply(br, http.MethodGet); err != nil || r.StatusCode != http.StatusOK {
				t.Fatalf("%v, %v", r, err)
			}
			synctest.Wait()
		}
	})
	if socket.reads != 0 {
		t.Errorf("%d answers set the socket's deadline %d times", answers, socket.reads)
	}
}

// waits tells how long a request waited for its caller, who never comes.
type waits struct {
	*callers
	took chan time.Duration
}

func (w waits) Wait(ctx context.Context, ip netip.Addr) (*Caller, error) {
	start := time.Now()
	defer func() { w.took <- time.Since(start) }()
	return w.callers.Wait(ctx, ip)
}

// Nothing is held for a client that has left.
func TestHoldEndsWithTheClient(t *testing.T) {
	for _, earlier := range []int{0, 3} {
		var w waits
		servePipe(t, func() CallerFinder { w = waits{newCallers(), make(chan time.Duration, 1)}; return w }, func(peer net.Conn, br *bufio.Reader) {
			for range earlier {
				go func() { _, _ = io.WriteString(peer, "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n") }()
				if r, err := readReply(br, http.MethodGet); err != nil || r.StatusCode != http.StatusOK {
					t.Fatalf("%v, %v", r, err)
				}
			}
			_, _ = fmt.Fprintf(peer, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", roleList)
			time.Sleep(2 * time.Second)
			_ = peer.Close()
			if took := <-w.took; took != 2*time.Second {
				t.Errorf("after %d answers, held for %v, want until the client left after 2s", earlier, took)
			}
		})
	}
}
