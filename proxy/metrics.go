package proxy

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// handlerLabel is the handler label: one per kind of table entry, so a client cannot invent one.
type handlerLabel int

const (
	handlerOther handlerLabel = iota // not in the table
	handlerToken
	handlerRoot
	handlerRoleList
	handlerDocument
	handlerInfo
	handlerMetadata // passed through
	handlers
)

func (h handlerLabel) String() string {
	return [handlers]string{"other", "token", "root", "role_list", "document", "iam_info", "metadata"}[h]
}

// metrics hold every series from the start: the hit path only adds to them, and the number of series never changes.
type metrics struct {
	requests         [handlers]map[int]prometheus.Counter // by status
	duration         [handlers]prometheus.Observer
	identifyWait     prometheus.Observer
	identifyFailures map[string]prometheus.Counter
	denied           map[string]prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_http_requests_total", Help: "Requests on the pod-facing port.",
	}, []string{"handler", "code"})
	histogram := prometheus.HistogramOpts{
		Name: "imdsgate_http_request_duration_seconds", Help: "Time to answer a request on the pod-facing port.",
		Buckets: []float64{
			10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1,
		},
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
	}
	duration := prometheus.NewHistogramVec(histogram, []string{"handler"})
	histogram.Name, histogram.Help = "imdsgate_identify_wait_seconds", "Time that requests were held until their pod was known."
	wait := prometheus.NewHistogram(histogram)
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_identify_failures_total", Help: "Requests whose pod could not be told.",
	}, []string{"reason"})
	denied := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_denied_requests_total", Help: "Requests that were refused, by reason.",
	}, []string{"reason"})

	m := &metrics{identifyWait: wait, identifyFailures: map[string]prometheus.Counter{}, denied: map[string]prometheus.Counter{}}
	for h := range handlers {
		m.duration[h] = duration.WithLabelValues(h.String())
		m.requests[h] = map[int]prometheus.Counter{}
		for _, code := range []int{ // all that serve answers
			http.StatusOK, http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound,
			http.StatusMethodNotAllowed, http.StatusServiceUnavailable,
		} {
			m.requests[h][code] = requests.WithLabelValues(h.String(), strconv.Itoa(code))
		}
	}
	for _, r := range []string{reasonNotSynced, reasonUnknownIP, reasonAmbiguous, reasonIncomplete, reasonIdentify} {
		m.identifyFailures[r] = failures.WithLabelValues(r)
	}
	for _, r := range []string{
		reasonHost, reasonMethod, reasonPath, reasonForwarded, reasonTTL, reasonToken, reasonFlood, reasonConnections,
		reasonOtherRole, reasonNoRole, reasonDenied, reasonInvalid, reasonCredentials,
	} {
		m.denied[r] = denied.WithLabelValues(r)
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{requests, duration, wait, failures, denied} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) observe(h handlerLabel, code int, elapsed time.Duration) {
	m.duration[h].Observe(elapsed.Seconds())
	m.requests[h][code].Inc()
}
