package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"log"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// FuzzWire sends whatever bytes over a connection as Serve has it, from the accepted connection to the last answer: whatever
// they are, nothing outside the table is asked of the real endpoint, nobody gets another's credentials, nothing is a
// redirect, and every answer has a length, so that the next one is found where it is. What comes in pieces is answered as
// what comes at once.
func FuzzWire(f *testing.F) {
	own := "GET " + roleList + "/my-role HTTP/1.1\r\n"
	smuggled := "GET " + roleList + "/other-role HTTP/1.1\r\n" + hostLine + "\r\n"
	put := "PUT /latest/api/token HTTP/1.1\r\n" + hostLine + tokenTTLHeader + ": 60\r\n"
	for _, s := range []string{
		own + hostLine + "\r\n", own + "\r\n", put + "\r\n" + own + hostLine + "\r\n", own + hostLine + "X-Forwarded-For: 127.0.0.3\r\n\r\n", "HEAD " + roleList + "/ HTTP/1.1\r\n\r\n" + smuggled,
		put + "Content-Length: 5\r\n\r\nhello" + smuggled, put + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, put + "Content-Length: 0\r\n Content-Length: 5\r\n\r\n" + smuggled,
		put + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, put + "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + smuggled, put + "Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
		"GET http://169.254.169.254" + roleList + "/ HTTP/1.1\r\n" + hostLine + "\r\n", "GET /latest/user-data HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + smuggled, "GET /latest/meta-data/placement/region HTTP/1.1\r\n\r\n" + own + "\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\nA: b\rHost: x\n\n", "\x16\x03\x01\x00\x05", "OPTIONS * HTTP/1.1\r\n" + hostLine + "\r\n", own + hostLine + tokenHeader + ": x\r\n\r\n", own + strings.Repeat("A: b\r\n", 900) + "\r\n",
	} {
		f.Add([]byte(s), uint8(0))
		f.Add([]byte(s), uint8(3))
	}
	mine, others := grant("team/my-role"), grant("other-role")
	creds := issuedBy(f, mine, others)
	callers := newCallers()
	callers.set(podIPs["role"], caller("role", mine, nil), nil)
	callers.set(podIPs["other"], caller("other", others, nil), nil)
	s, err := NewServer(Options{
		Callers: callers, Credentials: perKey{mine.Key.RoleARN: creds[0], others.Key.RoleARN: creds[1]}, TokenKey: bytes.Repeat([]byte("k"), 32), IMDSv1: true, Hold: time.Millisecond, MetadataAddr: "127.0.0.1:1",
	})
	if err != nil {
		f.Fatal(err)
	}
	up := &recorder{}
	s.upstream.client.Transport = up
	say := func(in []byte, chunk int) []byte {
		s.tokenRefusals = newRateLimits[netip.Addr](tokenRefusalRate, tokenRefusalRate) // time begins anew for each input
		fed := newFed(in, chunk)
		fed.stays = time.Second
		c := &conn{Conn: fed, shares: newShares(1, 1)}
		c.shares.acquire(c, podIPs["role"], time.Now())
		hs := s.httpServer()
		hs.ErrorLog = log.New(io.Discard, "", 0)
		_ = hs.Serve(&oneConn{conn: c, done: fed.closed})
		<-fed.closed
		_ = hs.Close()
		return fed.out.Bytes()
	}
	f.Fuzz(func(t *testing.T, in []byte, by uint8) {
		if len(in) > 8<<10 {
			return
		}
		var out, pieces []byte
		synctest.Test(t, func(*testing.T) { // net/http sleeps before it closes on what it cannot read
			out = say(in, 1<<20)
			if by > 0 {
				pieces = say(in, int(by))
			}
		})
		if bytes.Contains(out, []byte(secretOf("other-role"))) {
			t.Errorf("%q: another's credentials: %q", in, out)
		}
		if n := up.outside.Load(); n > 0 {
			t.Fatalf("%q: %d requests outside the table", in, n)
		}
		for rest := bufio.NewReader(bytes.NewReader(out)); ; {
			head, err := rest.Peek(1)
			if len(head) == 0 && errors.Is(err, io.EOF) {
				break
			}
			resp, err := http.ReadResponse(rest, nil)
			if err != nil {
				t.Fatalf("%q: no answer: %v in %q", in, err, out)
			}
			if resp.StatusCode >= 300 && resp.StatusCode < 400 || resp.Header.Get("Location") != "" {
				t.Fatalf("%q: redirect: %q", in, out)
			}
			if resp.StatusCode != http.StatusContinue && resp.ContentLength < 0 {
				t.Fatalf("%q: without a length: %q", in, out)
			}
			if bytes.Contains(in, []byte("HEAD")) {
				break // nobody but the client knows whether a body follows
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatalf("%q: %v in %q", in, err, out)
			}
		}
		if by > 0 && !bytes.Contains(in, []byte("PUT")) && !bytes.Contains(in, []byte("\r\n\r\n\r\n")) {
			if !bytes.Equal(withoutDates(pieces), withoutDates(out)) {
				t.Errorf("%q by %d:\n%q, at once\n%q", in, by, pieces, out)
			}
		}
	})
}

// withoutDates leaves out what changes from second to second.
func withoutDates(b []byte) []byte {
	var kept [][]byte
	for line := range bytes.Lines(b) {
		if !bytes.HasPrefix(line, []byte("Date: ")) {
			kept = append(kept, line)
		}
	}
	return bytes.Join(kept, nil)
}
