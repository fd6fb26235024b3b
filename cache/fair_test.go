package cache

import (
	"testing"
	"testing/synctest"
	"time"
)

// Whoever changes annotations all the time makes new keys all the time, and asks for each. The others' refreshes and first requests
// do not wait for them.
func TestChangingKeysStarveNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		victim := testKey(1)
		victim.Duration = 10 * time.Minute
		const rate = 8
		r := start(t, func(o *Options) { o.Rate = rate }, map[Key]bool{victim: true})
		r.sts.set(after(50*time.Millisecond, nil))
		time.Sleep(time.Second)
		if r.Peek(&victim, nil, time.Now()) == nil {
			t.Fatal("not prefetched")
		}
		time.Sleep(4 * time.Minute) // it is refreshed between 4.5 and 5.5 min, and served up to 9
		const attack = 7 * time.Minute
		stop := time.Now().Add(attack)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := 1000; time.Now().Before(stop); i++ {
				key := testKey(i)
				key.Namespace, key.ServiceAccount = "mallory", "m"
				r.live.set(map[Key]bool{victim: true, key: true})
				r.Wake()
				go func() { _, _ = r.get(key, 450*time.Millisecond) }()
				time.Sleep(60 * time.Millisecond)
			}
		}()
		var unserved, late int
		for i := 2; time.Now().Before(stop); i++ {
			if r.Peek(&victim, nil, time.Now()) == nil {
				unserved++
			}
			if _, err := r.get(testKey(i), 450*time.Millisecond); err != nil {
				late++
			}
			time.Sleep(2 * time.Second)
		}
		<-done
		if unserved > 0 || late > 0 {
			t.Errorf("credentials that were there were not refreshed in time: %d times not served; %d first requests failed", unserved, late)
		}
		if calls, all := len(r.sts.issued()), int(rate*attack.Seconds()); calls < all*9/10 { // they get what is left
			t.Errorf("%d calls of %d", calls, all)
		}
	})
}
