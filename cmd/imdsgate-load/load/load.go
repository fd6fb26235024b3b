package load

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxAnswer = 64 << 10              // that is read, head included
	sweep     = 50 * time.Millisecond // between looks for timeouts
)

// Failures that count as latency: the time that was waited in vain.
const (
	timedOut = "timeout"
	unserved = "no connection in time"
)

// Run asks until the last operation has ended, or ctx is done, which is an error. An endpoint that answers nothing is not: it
// shows in the Result.
func Run(ctx context.Context, o Options) (*Result, error) {
	o, err := o.complete()
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	steps := sequence(o.Version)
	known := learned{role: []byte(o.Role)}
	if o.Sequence == Document {
		before := steps[:len(steps)-1]
		if steps = steps[len(steps)-1:]; o.Role != "" {
			before = before[:len(before)-1]
		}
		if known, err = learn(ctx, o, before); err != nil {
			return nil, fmt.Errorf("load: ask for what comes before the document: %w", err)
		}
	}
	g, err := newGenerator(ctx, o, steps, known)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer g.close()
	if err := g.run(); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	return g.result, nil
}

func sequence(version int) []step {
	if version == 1 {
		return []step{askList, askDocument}
	}
	return []step{askToken, askList, askDocument}
}

// learn asks once for what must be known before the first operation.
func learn(ctx context.Context, o Options, steps []step) (learned, error) {
	known := learned{role: []byte(o.Role)}
	if len(steps) == 0 {
		return known, nil
	}
	o.Connections, o.Reuse, o.Rate, o.Warmup, o.Duration, o.Want = 1, PerSequence, 1000, 0, time.Millisecond, 200
	g, err := newGenerator(ctx, o, steps, known)
	if err != nil {
		return known, err
	}
	defer g.close()
	if err := g.run(); err != nil {
		return known, err
	}
	for failure := range g.result.Errors {
		return known, errors.New(failure)
	}
	return g.conns[0].known, nil
}

// generator is one run.
type generator struct {
	ctx    context.Context
	o      Options
	steps  []step
	result *Result
	known  learned // before the first request of every operation

	epoll, timer int
	cancelled    int // an eventfd, written when ctx is done
	stop         func() bool
	conns        []*conn
	idle         []*conn // the one that became so last comes first: as few connections as will do

	start    time.Time // of the first operation
	interval time.Duration
	counted  int64 // operations from this one on
	total    int64
	next     int64 // the next operation to begin
	busy     int
	swept    time.Time // when timeouts were looked for
}

func newGenerator(ctx context.Context, o Options, steps []step, known learned) (*generator, error) {
	interval := time.Duration(float64(time.Second) / o.Rate)
	g := &generator{
		ctx: ctx, o: o, steps: steps, known: known, interval: interval, epoll: -1, timer: -1, cancelled: -1,
		result:  &Result{Options: o, Errors: map[string]int64{}, Latency: newHistogram(), Lateness: newHistogram()},
		counted: int64(o.Warmup / interval), total: max(1, int64((o.Warmup+o.Duration)/interval)),
	}
	var err error
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		g.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	}
	if err == nil {
		g.cancelled, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	for i, fd := range []int{g.timer, g.cancelled} {
		if err == nil {
			err = unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(-1 - i)})
		}
	}
	if err != nil {
		g.close()
		return nil, err
	}
	eventfd := g.cancelled
	g.stop = context.AfterFunc(ctx, func() { _, _ = unix.Write(eventfd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })
	for i := range o.Connections {
		c := &conn{g: g, index: int32(i), fd: -1, in: make([]byte, 0, maxAnswer)}
		g.conns = append(g.conns, c)
		g.idle = append(g.idle, c)
	}
	return g, nil
}

func (g *generator) close() {
	if g.stop != nil && !g.stop() {
		<-g.ctx.Done() // the function may be about to write: leave it its descriptor
		g.cancelled = -1
	}
	for _, c := range g.conns {
		c.disconnect()
	}
	for _, fd := range []int{g.epoll, g.timer, g.cancelled} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// run is the loop. Nothing in it allocates, so that no collection of garbage comes between.
func (g *generator) run() error {
	g.result.Began = time.Now()
	g.start = g.result.Began.Add(g.interval)
	last := g.start.Add(time.Duration(g.total) * g.interval).Add(g.o.Timeout)
	events := make([]unix.EpollEvent, 128)
	for {
		now := time.Now()
		for g.next < g.total && len(g.idle) > 0 && !g.due(g.next).After(now) {
			c := g.idle[len(g.idle)-1]
			g.idle = g.idle[:len(g.idle)-1]
			c.begin(g.next, now)
			g.next++
		}
		if g.next == g.total && g.busy == 0 {
			break
		}
		if now.After(last) {
			g.giveUp(now)
			break
		}
		if err := g.setTimer(now, last); err != nil {
			return err
		}
		n, err := unix.EpollWait(g.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			switch e.Fd {
			case -1:
				var count [8]byte
				_, _ = unix.Read(g.timer, count[:])
				g.expire()
			case -2:
				return g.ctx.Err()
			default:
				g.conns[e.Fd].ready(e.Events)
			}
		}
	}
	g.result.Elapsed = time.Since(g.result.Began)
	return nil
}

// due is when operation n is to begin.
func (g *generator) due(n int64) time.Time { return g.start.Add(time.Duration(n) * g.interval) }

// setTimer makes the kernel wake the loop for the next operation, unless none could begin, and every so often for timeouts.
func (g *generator) setTimer(now, last time.Time) error {
	wait := min(last.Sub(now)+time.Millisecond, sweep)
	if g.next < g.total && len(g.idle) > 0 {
		wait = min(wait, g.due(g.next).Sub(now))
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(wait, time.Nanosecond)))}
	if err := unix.TimerfdSettime(g.timer, 0, &spec, nil); err != nil {
		return fmt.Errorf("timer: %w", err)
	}
	return nil
}

// expire ends the operations whose time is up.
func (g *generator) expire() {
	now := time.Now()
	if now.Sub(g.swept) < sweep {
		return
	}
	g.swept = now
	for _, c := range g.conns {
		if c.busy && now.Sub(c.began) > g.o.Timeout {
			c.end(now, timedOut)
		}
	}
}

// giveUp counts what is still under way, and what never got a connection.
func (g *generator) giveUp(now time.Time) {
	for _, c := range g.conns {
		if c.busy {
			c.end(now, timedOut)
		}
	}
	for ; g.next < g.total; g.next++ {
		g.count(g.next, now, unserved)
	}
}

// count notes the end of operation n. failure is empty for a good one.
func (g *generator) count(n int64, now time.Time, failure string) {
	if n < g.counted {
		return
	}
	r := g.result
	r.Operations++
	if failure != "" {
		r.Failed++
		r.Errors[failure]++
	}
	switch failure {
	case "", timedOut, unserved:
		record(r.Latency, now.Sub(g.due(n)))
	}
}
