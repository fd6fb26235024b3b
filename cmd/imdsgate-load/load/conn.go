package load

import (
	"errors"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// conn is one connection, or the place of one that is not open.
type conn struct {
	g     *generator
	index int32
	fd    int // -1: not open

	busy  bool
	n     int64 // the operation
	began time.Time
	free  time.Time // when the last operation ended
	at    int       // the step
	known learned
	out   []byte // of the request, not written yet
	buf   []byte // the whole request
	in    []byte // of the answer so far
}

// begin starts operation n.
func (c *conn) begin(n int64, now time.Time) {
	c.busy, c.n, c.began, c.at = true, n, now, 0
	c.known.token = append(c.known.token[:0], c.g.known.token...)
	c.known.role = append(c.known.role[:0], c.g.known.role...)
	c.g.busy++
	if due := c.g.due(n); n >= c.g.counted && !c.free.After(due) { // else the endpoint has made it wait
		record(c.g.result.Lateness, now.Sub(due))
	}
	c.ask()
}

// ask sends the request of the present step.
func (c *conn) ask() {
	c.buf = c.known.request(c.buf[:0], c.g.steps[c.at])
	c.out, c.in = c.buf, c.in[:0]
	if c.fd < 0 {
		if err := c.connect(); err != nil {
			c.end(time.Now(), kind(err))
		}
		return
	}
	c.write()
}

func (c *conn) connect() error {
	family, sockaddr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(c.g.o.Endpoint.Port()), Addr: c.g.o.Endpoint.Addr().As16()})
	if a := c.g.o.Endpoint.Addr().Unmap(); a.Is4() {
		family, sockaddr = unix.AF_INET, &unix.SockaddrInet4{Port: int(c.g.o.Endpoint.Port()), Addr: a.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	c.fd = fd
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	// Once for its life, and told of changes only: a short request always fits, and answers are read as they come.
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: c.index}
	if err := unix.EpollCtl(c.g.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return err
	}
	if err := unix.Connect(fd, sockaddr); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	return nil
}

func (c *conn) disconnect() {
	if c.fd >= 0 {
		_ = unix.Close(c.fd) // epoll forgets it
		c.fd = -1
	}
}

// ready goes on with what the kernel says is possible now.
func (c *conn) ready(events uint32) {
	if c.fd < 0 {
		return // closed by an event before this one
	}
	if !c.busy { // idle, and the endpoint has ended the connection
		if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
			c.disconnect()
		}
		return
	}
	if events&unix.EPOLLERR != 0 {
		code, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		c.end(time.Now(), kind(err))
		return
	}
	if len(c.out) > 0 && events&unix.EPOLLOUT != 0 {
		c.write()
	}
	if c.busy && events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 {
		c.read()
	}
}

func (c *conn) write() {
	n, err := unix.Write(c.fd, c.out)
	switch {
	case err == nil:
		c.out = c.out[n:]
	case errors.Is(err, unix.EAGAIN):
	default:
		c.end(time.Now(), kind(err))
	}
}

func (c *conn) read() {
	for c.busy {
		if len(c.in) == cap(c.in) {
			c.end(time.Now(), errTooLong.Error())
			return
		}
		n, err := unix.Read(c.fd, c.in[len(c.in):cap(c.in)])
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case err != nil:
			c.end(time.Now(), kind(err))
			return
		case n == 0:
			c.end(time.Now(), "cut")
			return
		}
		c.in = c.in[:len(c.in)+n]
		r, ok, err := parse(c.in)
		if err != nil {
			c.end(time.Now(), err.Error())
			return
		}
		if ok {
			c.answered(r)
			return
		}
	}
}

// answered goes on with the next step, or ends the operation.
func (c *conn) answered(r response) {
	g := c.g
	final := c.at == len(g.steps)-1
	want := g.o.Want
	if !final && r.status != want {
		want = 200
	}
	if r.close || g.o.Reuse == PerRequest || g.o.Reuse == PerSequence && (final || r.status != 200) { // any but 200 is the last
		c.disconnect()
	}
	if r.status == 200 {
		c.known.learn(g.steps[c.at], r.body)
	}
	switch {
	case r.status != want:
		c.finish(time.Now(), "status "+strconv.Itoa(r.status))
	case final || want != 200:
		c.finish(time.Now(), "")
	default:
		c.at++
		c.ask()
	}
}

// end is the operation's failure; the connection cannot be relied upon any more.
func (c *conn) end(now time.Time, failure string) {
	c.disconnect()
	c.finish(now, failure)
}

func (c *conn) finish(now time.Time, failure string) {
	c.g.count(c.n, now, failure)
	c.busy, c.free, c.out = false, now, nil
	c.g.busy--
	c.g.idle = append(c.g.idle, c)
}

// kind names what went wrong.
func kind(err error) string {
	switch {
	case err == nil, errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return "cut"
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "refused"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return "no local port left"
	}
	return err.Error()
}
