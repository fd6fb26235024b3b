package cache

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// An issuer that throttles is asked at half the pace, once for calls that were under way together, and at the full one again
// after some minutes.
func TestPace(t *testing.T) {
	now := time.Now()
	p := newPace(10)
	want := func(limit float64) {
		t.Helper()
		p.adjust(now)
		if got := float64(p.bucket.Limit()); got < limit*0.99 || got > limit*1.01 {
			t.Errorf("pace %.3f, want %.3f", got, limit)
		}
	}
	want(10)
	p.throttled(now)
	p.throttled(now.Add(900 * time.Millisecond))
	want(5)
	if tokens := p.bucket.TokensAt(now); tokens >= 1 {
		t.Errorf("%.1f calls were saved up", tokens)
	}
	now = now.Add(30 * time.Second)
	want(5 * 1.4142)
	p.throttled(now)
	want(2.5 * 1.4142)
	for range 20 {
		now = now.Add(time.Second)
		p.throttled(now)
	}
	want(0.1)
	now = now.Add(6 * time.Minute)
	want(6.4)
	now = now.Add(time.Minute)
	want(10)
	p.throttled(now)
	want(5)
}

// While STS throttles, a key that a request waits for does not back off behind those that are only fetched ahead.
func TestThrottledKeyStaysFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		throttled := &IssueError{Code: "Throttling", Throttled: true, Err: errors.New("Throttling: Rate exceeded")}
		r := start(t, answering(after(0, throttled)), keys(50))
		asked := testKey(7)
		for range 60 { // as an SDK does
			if _, err := r.get(asked, 450*time.Millisecond); err == nil {
				t.Fatal("STS throttles everything")
			}
			time.Sleep(550 * time.Millisecond)
		}
		if n := len(r.sts.take()); n > 60 {
			t.Errorf("%d calls in a minute of throttling", n)
		}
		r.sts.set(nil)
		begun := time.Now()
		for {
			if _, err := r.get(asked, 450*time.Millisecond); err == nil {
				break
			}
			time.Sleep(550 * time.Millisecond)
		}
		if took := time.Since(begun); took > 11*time.Second {
			t.Errorf("served %v after STS answers again", took)
		}
		if calls := r.sts.issued(); calls[0].key != asked {
			t.Errorf("%s was first", calls[0].key.RoleARN)
		}
	})
}
