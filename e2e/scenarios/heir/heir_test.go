package heir

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// A connection goes from one socket to the next without a word to the server, which goes on serving it.
func TestConnectionIsHandedOn(t *testing.T) {
	var states []string
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.RemoteAddr, " ", r.URL.Path)
	}))
	changed := make(chan string, 16)
	server.Config.ConnState = func(c net.Conn, s http.ConnState) { changed <- fmt.Sprint(c.RemoteAddr(), " ", s) }
	server.Start()
	defer server.Close()
	c, err := net.Dial("tcp4", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	first := ask(t, c, "/first")
	for range 3 {
		frozen, err := Freeze(c.(*net.TCPConn))
		if err != nil {
			t.Fatal("freeze (needs root): ", err)
		}
		if c, err = frozen.Thaw(); err != nil {
			t.Fatal("thaw: ", err)
		}
		if again := ask(t, c, "/first"); again != first {
			t.Errorf("the server sees %q, then %q", first, again)
		}
	}
	c.Close()
	want := fmt.Sprint(c.LocalAddr(), " closed")
	for end := time.After(5 * time.Second); ; {
		select {
		case s := <-changed:
			states = append(states, s)
			if s == want {
				if len(states) != 10 { // new, four times active and idle, closed
					t.Errorf("states: %q", states)
				}
				return
			}
		case <-end:
			t.Fatalf("the end is not seen: %q", states)
		}
	}
}

func ask(t *testing.T, c net.Conn, path string) string {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: test\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
