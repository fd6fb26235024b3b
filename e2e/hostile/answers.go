package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Outcome is what came of a corpus.
type Outcome struct {
	Requests    int
	Statuses    map[string]int    // answers
	Keys        map[string]string // each access key in an answer, and a request that was given it; whose it is, AWS knows
	Unconnected map[string]int    // requests without a connection, by error
	Failed      int               // requests that were answered what nobody may be, or not in time
	Failures    []string          // what was wrong with the first of them
}

// Check says what is wrong, apart from whose the keys are: answers that nobody may be given, requests that had no connection, and
// a corpus that did not reach what it should.
func (o Outcome) Check() error {
	var errs []error
	for _, f := range o.Failures {
		errs = append(errs, errors.New(f))
	}
	if o.Failed > len(o.Failures) {
		errs = append(errs, fmt.Errorf("%d failures in all", o.Failed))
	}
	for err, n := range o.Unconnected {
		errs = append(errs, fmt.Errorf("%d requests had no connection: %s", n, err))
	}
	for _, status := range []string{"200", "400", "403", "404", "405", "401", "501", "505"} {
		if o.Statuses[status] == 0 {
			errs = append(errs, fmt.Errorf("no request was answered %s: the corpus does not reach what it should", status))
		}
	}
	return errors.Join(errs...)
}

var (
	statusLine = regexp.MustCompile(`HTTP/1\.[01] (\d{3}) `)
	never      = regexp.MustCompile(`HTTP/1\.[01] [23]\d\d |(?i)\r\nlocation:|\r\ntransfer-encoding:`)
	accessKeys = regexp.MustCompile(`(?:ASIA|AKIA)[A-Z0-9]{8,}`)
)

// ofNode finds what belongs to the node alone; role is the name of its role.
func ofNode(role string) *regexp.Regexp {
	return regexp.MustCompile(regexp.QuoteMeta(imds.Mark) + `|instance-profile/` + role + `|(?:^|\n)` + role + `(?:$|\n)`)
}

// Try speaks each request over a connection of its own, several at a time, and judges the answers.
func Try(ctx context.Context, dial func(context.Context) (net.Conn, error), requests []Request, nodeRole string) Outcome {
	o := Outcome{Requests: len(requests), Statuses: map[string]int{}, Keys: map[string]string{}, Unconnected: map[string]int{}}
	marks := ofNode(nodeRole)
	var mu sync.Mutex
	try := func(r Request) {
		c, err := dial(ctx)
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			o.Unconnected[err.Error()]++
			return
		}
		answer, err := Speak(c, r.Raw)
		if errors.Is(err, syscall.ECONNRESET) {
			err = nil // not worth an answer
		}
		if err == nil {
			err = judge(r, answer, marks)
		}
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			if o.Failed++; o.Failed <= 20 {
				o.Failures = append(o.Failures, fmt.Sprintf("%s: %v\n%.600q\nis answered\n%.600q", r.Name, err, r.Raw, answer))
			}
		}
		for _, key := range accessKeys.FindAllString(answer, -1) {
			o.Keys[key] = r.Name
		}
		for _, m := range statusLine.FindAllStringSubmatch(answer, -1) {
			o.Statuses[m[1]]++
		}
	}
	var workers sync.WaitGroup
	const atOnce = 6
	for w := range atOnce {
		workers.Go(func() {
			for i := w; i < len(requests) && ctx.Err() == nil; i += atOnce {
				try(requests[i])
			}
		})
	}
	workers.Wait()
	return o
}

// judge says what is in an answer that nobody may be given.
func judge(r Request, answer string, marks *regexp.Regexp) error {
	if m := marks.FindString(answer); m != "" {
		return fmt.Errorf("the node's %q", m)
	}
	for _, found := range never.FindAllString(answer, -1) {
		if !strings.HasSuffix(found, " 100 ") && !(r.Served && strings.HasSuffix(found, " 200 ")) {
			return fmt.Errorf("must not be answered %q", found)
		}
	}
	return nil
}

// Speak writes to a connection, ends it there, and returns everything that is answered within 10 s.
func Speak(c net.Conn, raw string) (string, error) {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	go func() {
		_, _ = io.WriteString(c, raw) // may be answered and closed before all of it is read
		if half, ok := c.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	}()
	answer, err := io.ReadAll(c)
	if len(answer) > 0 && !os.IsTimeout(err) {
		err = nil // a reset after the answer: not all of the request was read
	}
	return string(answer), err
}
