package cache

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct{ hit, stale, waited, failed prometheus.Counter }

func newMetrics(r prometheus.Registerer, c *Cache) metrics {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_credentials_requests_total",
		Help: "Requests for credentials by how they were met: hit, wait (for an issue), stale (a refresh failed, but they are still valid), error.",
	}, []string{"result"})
	if r != nil {
		r.MustRegister(requests, &collector{
			cache: c,
			entries: prometheus.NewDesc("imdsgate_credentials_entries",
				"Keys that credentials are kept for, by state: ready, pending (none yet), failed (none, and the last try failed).", []string{"state"}, nil),
			expiry: prometheus.NewDesc("imdsgate_credentials_soonest_expiry_timestamp_seconds",
				"When the first of the credentials that are being served expires. Absent while there are none.", nil, nil),
		})
	}
	return metrics{
		hit:    requests.WithLabelValues("hit"),
		stale:  requests.WithLabelValues("stale"),
		waited: requests.WithLabelValues("wait"),
		failed: requests.WithLabelValues("error"),
	}
}

// served counts an answer that needed no waiting.
func (m *metrics) served(e *entry) {
	if e.err != nil {
		m.stale.Inc()
	} else {
		m.hit.Inc()
	}
}

// collector reads the gauges off the entries when asked: there is no second state that could disagree.
type collector struct {
	cache           *Cache
	entries, expiry *prometheus.Desc
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.entries
	ch <- c.expiry
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	states := map[State]float64{Ready: 0, Pending: 0, Failed: 0}
	var soonest time.Time
	for e := range c.cache.Snapshot() {
		states[e.State]++
		if e.State == Ready && (soonest.IsZero() || e.Expires.Before(soonest)) {
			soonest = e.Expires
		}
	}
	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(c.entries, prometheus.GaugeValue, n, string(state))
	}
	if !soonest.IsZero() {
		ch <- prometheus.MustNewConstMetric(c.expiry, prometheus.GaugeValue, float64(soonest.UnixMilli())/1000)
	}
}
