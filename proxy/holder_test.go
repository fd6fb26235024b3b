package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/cache"
)

// A connection is the pod's that was identified on it: it is reset when the IP becomes another's, and no sooner.
func TestConnectionsOfAnEarlierHolder(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role", "other")
	ip := podIPs["role"]
	const document = "GET " + roleList + "/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
	open := func(request string) func() (string, error) {
		c := dial(t, l.addr, ip)
		in := bufio.NewReader(c)
		ask := func(request string) (string, error) {
			_, _ = io.WriteString(c, request) // a reset shows when it is read
			r, err := readReply(in, "GET")
			if err != nil {
				return "", err
			}
			return r.body, nil
		}
		if _, err := ask(request); err != nil {
			t.Fatal(err)
		}
		return func() (string, error) { return ask(document) }
	}
	earlier := []func() (string, error){open(document), open("GET " + metaData + "instance-id HTTP/1.1\r\n\r\n")}
	nobodys := open("GET / HTTP/1.1\r\n\r\n")
	l.Moved(ip, "role")
	l.Moved(podIPs["other"], "")
	for _, ask := range earlier {
		if got, err := ask(); got != "my-role" {
			t.Errorf("nothing has changed: %q, %v", got, err)
		}
	}
	l.callers.set(ip, caller("other", grant("other-role"), nil), nil)
	l.Moved(ip, "other")
	for _, ask := range earlier {
		if got, err := ask(); err == nil {
			t.Errorf("on a connection of the earlier holder: %q", got)
		}
	}
	if got, err := nobodys(); got != "other-role" {
		t.Errorf("on a connection that was nobody's: %q, %v", got, err)
	}
	if n := l.conns.of(ip); n != 1 {
		t.Errorf("%d connections are counted", n)
	}
}

// So is one whose request waits for STS when the IP changes hands.
func TestHeldForAnEarlierHolder(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Hold = 20 * time.Second })
	ip := podIPs["role"]
	called := make(chan struct{})
	done := make(chan struct{})
	defer close(done)
	l.issuer.fail = func(cache.Key) error {
		close(called)
		<-done
		return errors.New("too late")
	}
	c := dial(t, l.addr, ip)
	fmt.Fprint(c, "GET "+roleList+"/my-role HTTP/1.1\r\n\r\n")
	<-called
	l.callers.set(ip, nil, ErrUnknownIP)
	l.Moved(ip, "")
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

// swapped is a CallerFinder that is asked just before the IP changes hands.
type swapped struct {
	*callers
	before func()
}

func (s *swapped) Find(ip netip.Addr) (*Caller, error) {
	c, err := s.callers.Find(ip)
	if before := s.before; before != nil {
		s.before = nil
		before()
	}
	return c, err
}

// Whoever was found just before the IP changed hands is not who is answered.
func TestMovedMeanwhile(t *testing.T) {
	finder := &swapped{}
	l := newLab(t, func(o *Options) {
		finder.callers = o.Callers.(*callers)
		o.Callers = finder
	})
	l.warm(t, "role", "other")
	ip := podIPs["role"]
	finder.before = func() {
		l.callers.set(ip, caller("other", grant("other-role"), nil), nil)
		l.Moved(ip, "other")
	}
	if r := l.get(t, "role", roleList+"/"); r.body != "other-role" {
		t.Errorf("answered %d %s", r.StatusCode, r.body)
	}
}

// What a peer does not acknowledge is not sent for ever, not even when this process is gone.
func TestUnacknowledgedEnds(t *testing.T) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // as those of the pods
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := boundBuffers(ln); err != nil {
		t.Fatal(err)
	}
	dial(t, ln.Addr().String(), podIPs["role"])
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var ms int
	if err := control(c, func(fd int) (err error) {
		ms, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		return err
	}); err != nil || time.Duration(ms)*time.Millisecond != unacknowledged {
		t.Errorf("%d ms, %v", ms, err)
	}
	if !acknowledged(c) {
		t.Error("of nothing something is not acknowledged")
	}
	one, two := net.Pipe()
	defer one.Close()
	defer two.Close()
	if !acknowledged(one) {
		t.Error("a pipe acknowledges nothing")
	}
}

// A connection that its peer has reset has nothing under way: it is not kept until that would have been acknowledged.
func TestResetByThePeer(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{Listener: ln, shares: newShares(1, 1), accepted: func(time.Time) {}, refused: func() {}}
	defer l.Close()
	ip := podIPs["role"]
	_ = dial(t, ln.Addr().String(), ip).Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for err == nil { // until its kernel has said that nobody reads
		_, err = io.WriteString(c, "an answer")
	}
	if acknowledged(c.(*conn).Conn) {
		t.Error("nothing is under way: the test shows nothing")
	}
	if err := c.Close(); err != nil || l.shares.of(ip) > 0 {
		t.Errorf("%d connections are kept: %v", l.shares.of(ip), err)
	}
}
