package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const hostLine = "Host: 169.254.169.254\r\n"

func TestHostIsCompleted(t *testing.T) {
	get := "GET / HTTP/1.1\r\n"
	long := "X-Long: " + strings.Repeat("x", maxHostHead) + "\r\n"
	for name, tc := range map[string]struct{ in, want string }{
		"bare":                {get + "\r\n", get + hostLine + "\r\n"},
		"headers":             {get + "A: b\r\n\r\n", get + "A: b\r\n" + hostLine + "\r\n"},
		"line feeds":          {"GET / HTTP/1.1\nA: b\n\n", "GET / HTTP/1.1\nA: b\n" + hostLine + "\n"},
		"has one":             {get + "host: x\r\n\r\n", get + "host: x\r\n\r\n"},
		"has one first":       {get + "Host: x\r\nDate: y\r\n\r\n", get + "Host: x\r\nDate: y\r\n\r\n"},
		"has an empty one":    {get + "Host:\r\n\r\n", get + "Host:\r\n\r\n"},
		"PUT":                 {"PUT / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "PUT / HTTP/1.1\r\nContent-Length: 0\r\n" + hostLine + "\r\n"},
		"HEAD":                {"HEAD / HTTP/1.1\r\n\r\n", "HEAD / HTTP/1.1\r\n" + hostLine + "\r\n"},
		"pipelined":           {get + "\r\n" + get + "Host: x\r\n\r\n" + get + "\r\n", get + hostLine + "\r\n" + get + "Host: x\r\n\r\n" + get + hostLine + "\r\n"},
		"HTTP/1.0":            {"GET / HTTP/1.0\r\n\r\n" + get + "\r\n", "GET / HTTP/1.0\r\n\r\n" + get + hostLine + "\r\n"},
		"incomplete":          {get + "A: b\r\n", get + "A: b\r\n"},
		"one carriage return": {get + "\r", get + hostLine + "\r"},

		"body":                   {"PUT / HTTP/1.1\r\nContent-Length: 18\r\n\r\n" + get + "\r\n" + get + "\r\n", ""},
		"other length":           {"PUT / HTTP/1.1\r\ncontent-length: 00\r\n\r\n", ""},
		"chunked":                {"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get + "\r\n", ""},
		"body after a Host":      {"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" + get + "\r\n", ""},
		"continued length":       {"PUT / HTTP/1.1\r\nContent-Length: 0\r\n 5\r\n\r\n" + get + "\r\n", ""},
		"continued line":         {get + "A: b\r\n\tc\r\n\r\n", ""},
		"continued with a colon": {get + "A: b\r\n c: d\r\n\r\n", ""},
		"no colon":               {get + "A\r\n\r\n", ""},
		"POST":                   {"POST / HTTP/1.1\r\n\r\n", ""},
		"lower case":             {"get / HTTP/1.1\r\n\r\n", ""},
		"PRI":                    {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""},
		"HTTP/0.9":               {"GET /\r\n\r\n", ""},
		"version":                {"GET / HTTP/1.10\r\n\r\n", ""},
		"space":                  {"GET / x HTTP/1.1\r\n\r\n", ""},
		"empty line first":       {"\r\n" + get + "\r\n", ""},
		"TLS":                    {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", ""},
		"too long":               {get + long + "\r\n", ""},
		"too long in parts":      {get + strings.Repeat("A: b\r\n", maxHostHead/6) + "\r\n", ""},
	} {
		if tc.want == "" {
			tc.want = tc.in
		}
		for _, size := range []int{1, 2, 7, 64, 4096, 1 << 20} {
			for _, chunk := range []int{1, 3, 1 << 20} {
				c := &conn{Conn: newFed([]byte(tc.in), chunk)}
				var got bytes.Buffer
				if _, err := io.CopyBuffer(&got, struct{ io.Reader }{c}, make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				if got.String() != tc.want {
					t.Fatalf("%s, read by %d of %d:\n%q, want\n%q", name, size, chunk, short(got.String()), short(tc.want))
				}
				if len(c.partial) > maxHostHead || c.off && c.partial != nil {
					t.Errorf("%s: %d bytes are kept", name, len(c.partial))
				}
			}
		}
	}
}

func short(s string) string { return s[:min(len(s), 300)] }

// fed is a connection that is fed with input, at most chunk bytes at once, then ends. It keeps what is written.
type fed struct {
	mu     sync.Mutex
	in     []byte
	chunk  int
	stays  time.Duration // after the input: net/http gives up what it is at for a client that is gone
	out    bytes.Buffer
	closed chan struct{}
	once   sync.Once
}

func newFed(in []byte, chunk int) *fed {
	return &fed{in: in, chunk: chunk, closed: make(chan struct{})}
}

func (f *fed) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.in) == 0 {
		f.mu.Unlock()
		select {
		case <-time.After(f.stays):
		case <-f.closed:
		}
		f.mu.Lock()
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), f.chunk)], f.in)
	f.in = f.in[n:]
	return n, nil
}

func (f *fed) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.Write(p)
}

func (f *fed) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

func (f *fed) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80} }
func (f *fed) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2), Port: 1} }
func (f *fed) SetDeadline(time.Time) error      { return nil }
func (f *fed) SetReadDeadline(time.Time) error  { return nil }
func (f *fed) SetWriteDeadline(time.Time) error { return nil }

// exchange is what net/http answers to all of the input on one connection.
func exchange(t *testing.T, in []byte, chunk int, wrapped bool) string {
	f := newFed(in, chunk)
	c := &conn{Conn: f, off: !wrapped}
	ln := &oneConn{conn: c, done: f.closed}
	hs := &http.Server{
		ErrorLog: log.New(io.Discard, "", 0), MaxHeaderBytes: maxHeaderBytes, DisableGeneralOptionsHandler: true,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h["Date"] = nil
			body, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %q %s host=%q len=%d te=%v header=%q body=%q %v\n", r.Method, r.RequestURI, r.Proto, r.Host, r.ContentLength, r.TransferEncoding, r.Header, body, err != nil)
		}),
	}
	defer hs.Close()
	_ = hs.Serve(ln)
	select {
	case <-f.closed:
	case <-time.After(10 * time.Second):
		t.Fatalf("%q is never done with", in)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.String()
}

// oneConn is a listener that accepts one connection and ends with it.
type oneConn struct {
	conn     net.Conn
	accepted bool
	done     chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.accepted {
		l.accepted = true
		return l.conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

const missing = "HTTP/1.1 400 Bad Request: missing required Host header\r\n"

// FuzzHost compares with plain net/http on the same bytes. Where that misses a Host, it is as if it had been there; all
// other bytes get the same answers.
func FuzzHost(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nA: b\r\n\r\n", "GET / HTTP/1.0\r\n\r\n",
		"PUT /latest/api/token HTTP/1.1\r\nContent-Length: 0\r\n\r\nGET / HTTP/1.1\r\n\r\n", "HEAD / HTTP/1.1\n\nGET / HTTP/1.1\n\n",
		"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"PUT / HTTP/1.1\r\nContent-Length: 0\r\n 5\r\n\r\nGET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\n",
		"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello", "GET / HTTP/1.1\r\nA: b\rHost: x\r\n\r\n", "GET / HTTP/1.1\r\n\rHost: x\r\n\r\n",
		"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab", "GET / HTTP/1.1\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"GET http://a/ HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nTrailer: x\r\nExpect: 100-continue\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"GET / HTTP/1.1\r\nX: \x00\r\n\r\nGET / HTTP/1.1\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
	} {
		f.Add([]byte(s), uint8(0))
		f.Add([]byte(s), uint8(1))
	}
	f.Fuzz(func(t *testing.T, in []byte, by uint8) {
		if len(in) > 8<<10 {
			return
		}
		// net/http sleeps before it closes on what it cannot read.
		synctest.Test(t, func(t *testing.T) { compareHosts(t, in, by) })
	})
}

// compareHosts is one round of FuzzHost.
func compareHosts(t *testing.T, in []byte, by uint8) {
	chunk := int(by)
	if chunk == 0 {
		chunk = 1 << 20
	}
	plain, wrapped := exchange(t, in, chunk, false), exchange(t, in, chunk, true)
	before, _, lacks := strings.Cut(plain, missing)
	switch {
	case !lacks && plain != wrapped:
		t.Errorf("%q:\n%q, plain\n%q", in, wrapped, plain)
	case lacks && !strings.HasPrefix(wrapped, before):
		t.Errorf("%q:\n%q does not begin with\n%q", in, wrapped, before)
	}
	// The reader of the completed bytes never misses a Host, unless the insertion is switched off.
	c := &conn{Conn: newFed(in, chunk)}
	completed, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if again := exchange(t, completed, 1<<20, false); again != wrapped {
		t.Errorf("%q:\n%q, completed beforehand\n%q", in, wrapped, again)
	}
	if strings.Contains(wrapped, missing) && !c.off {
		t.Errorf("%q: a Host is missing: %q", in, wrapped)
	}
	if removed := bytes.ReplaceAll(completed, []byte(hostLine), nil); !bytes.Equal(removed, bytes.ReplaceAll(in, []byte(hostLine), nil)) {
		t.Errorf("%q: other bytes were changed: %q", in, completed)
	}
}

// net/http interrupts a reader by a deadline in the past while it waits for the next request; nothing may be lost by that.
func TestHostSurvivesDeadlines(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	c := &conn{Conn: b}
	defer c.Close()
	in := "GET / HTTP/1.1\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n\r\n"
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	go func() {
		for i := range in {
			_, _ = io.WriteString(a, in[i:i+1])
		}
		_ = a.Close()
	}()
	var got bytes.Buffer
	for p := make([]byte, 1); ctx.Err() == nil; {
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Microsecond))
		n, err := c.Read(p)
		got.Write(p[:n])
		if err != nil && !isTimeout(err) {
			break
		}
	}
	if want := "GET / HTTP/1.1\r\nA: b\r\n" + hostLine + "\r\nGET / HTTP/1.1\r\n" + hostLine + "\r\n"; got.String() != want {
		t.Errorf("%q", got.String())
	}
}

func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// What looks like the head of an answer, but is in a body, is not touched: its length was told already.
func TestBodiesAreNotCompleted(t *testing.T) {
	piped(t, func(t *testing.T, c *conn, _ *counted, peer net.Conn) {
		body := "400 Bad Request" + unreadable + "400 Bad Request"
		go func() { _, _ = c.Write([]byte(body)); _ = c.Close() }()
		if got, _ := io.ReadAll(peer); string(got) != body {
			t.Errorf("got %q", got)
		}
	})
}
